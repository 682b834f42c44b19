"""Receives `POST /v1/files`: a multipart body whose file is passed on to the store while it arrives.

Nothing exists until the whole body was received and is right; what was stored until then is deleted. The name that the
client gives the file is only ever shown.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import aiohttp
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from lorapool_api.openai import (
    InvalidRequestError,
    PayloadTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from lorapool_gateway.tuning.files import PURPOSE, FileRecord, Files

T = TypeVar("T")

MAX_FILE_BYTES = 512 * 2**20
MAX_FIELD_BYTES = 1024
MAX_PARTS = 16
OVERHEAD_BYTES = 64 * 1024
"""What fields, headers and boundaries of a body may have in addition to the file."""
CHUNK_BYTES = 256 * 1024
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Times of one upload."""

    silence_s: float
    """It is given up when nothing arrives for this long."""
    whole_s: float
    """And when it takes longer than this in all."""


@dataclass(slots=True)
class _Received:
    """What has arrived of one body."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    size: int = 0
    sha256: str | None = None
    """Of the stored file; None until it was received."""


async def receive(
    request: web.BaseRequest,
    files: Files,
    namespace: str,
    limits: UploadLimits,
    *,
    now_unix_s: Callable[[], float] = time.time,
) -> FileRecord:
    """The new file. Raises InvalidRequestError, PayloadTooLargeError, RequestTimeoutError and errors of the store."""
    reader = _reader(request)
    file_id, created_at, received = files.new_id(), int(now_unix_s()), _Received()
    try:
        async with asyncio.timeout(limits.whole_s):
            await _receive_parts(reader, received, limits, _Target(files, namespace, file_id, created_at))
            record = _record(file_id, created_at, received)
            await files.publish(namespace, record)
            return record
    except BaseException as error:
        if received.size or received.sha256 is not None:
            await asyncio.shield(files.discard(namespace, file_id))
        if isinstance(error, TimeoutError):
            raise RequestTimeoutError(f"The upload took longer than {limits.whole_s:g} s.") from None
        raise


def _reader(request: web.BaseRequest) -> aiohttp.MultipartReader:
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower() != "identity":
        raise UnsupportedMediaTypeError("Compressed bodies are not supported. Send it without `Content-Encoding`.")
    if request.content_type != "multipart/form-data":
        raise InvalidRequestError(
            "A file is sent as multipart/form-data with the fields purpose and file.", code="invalid_body"
        )
    if (request.content_length or 0) > MAX_FILE_BYTES + OVERHEAD_BYTES:
        raise _too_large()
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(CONTINUE)
    try:
        return aiohttp.MultipartReader(request.headers, request.content)
    except (ValueError, AssertionError) as error:
        raise _malformed() from error


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the file goes."""

    files: Files
    namespace: str
    file_id: str
    created_at: int


async def _receive_parts(
    reader: aiohttp.MultipartReader, received: _Received, limits: UploadLimits, target: _Target
) -> None:
    for _ in range(MAX_PARTS):
        part = await _in_time(reader.next(), limits)
        if part is None:
            return
        if not isinstance(part, aiohttp.BodyPartReader):
            raise _malformed()
        if part.name != "file":
            received.fields[part.name or ""] = await _field(part, limits)
        elif received.sha256 is not None:
            raise InvalidRequestError("There is more than one file.", param="file")
        else:
            received.filename = part.filename or ""
            expires_at = _expires_at(received.fields, target.created_at)
            body = _file(part, received, limits)
            stored = await target.files.write(target.namespace, target.file_id, body, expires_at)
            received.sha256 = stored.sha256
    raise InvalidRequestError(f"A body may have {MAX_PARTS} parts.", code="invalid_body")


async def _file(part: aiohttp.BodyPartReader, received: _Received, limits: UploadLimits) -> AsyncIterator[bytes]:
    while chunk := await _in_time(part.read_chunk(CHUNK_BYTES), limits):
        received.size += len(chunk)
        if received.size > MAX_FILE_BYTES:
            raise _too_large()
        yield chunk


async def _field(part: aiohttp.BodyPartReader, limits: UploadLimits) -> str:
    data = b""
    while chunk := await _in_time(part.read_chunk(MAX_FIELD_BYTES), limits):
        data += chunk
        if len(data) > MAX_FIELD_BYTES:
            raise InvalidRequestError(f"{part.name} is too long.", param=part.name)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{part.name} is not UTF-8.", param=part.name) from None


async def _in_time(step: Awaitable[T], limits: UploadLimits) -> T:
    """The next piece of the body. Raises RequestTimeoutError and, for a body that is none, InvalidRequestError."""
    try:
        async with asyncio.timeout(limits.silence_s):
            return await step
    except TimeoutError:
        raise RequestTimeoutError(f"The upload sent nothing for {limits.silence_s:g} s.") from None
    except (ValueError, AssertionError, RuntimeError, HttpProcessingError, web.RequestPayloadError) as error:
        raise _malformed() from error


def _expires_at(fields: dict[str, str], created_at: int) -> int | None:
    """Raises InvalidRequestError."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequestError("expires_after[anchor] must be created_at.", param="expires_after[anchor]")
    if not re.fullmatch(r"[0-9]{1,9}", seconds or "") or not MIN_EXPIRY_S <= int(seconds or "") <= MAX_EXPIRY_S:
        raise InvalidRequestError(
            f"expires_after[seconds] must be a number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}.",
            param="expires_after[seconds]",
        )
    return created_at + int(seconds or "")


def _record(file_id: str, created_at: int, received: _Received) -> FileRecord:
    """Raises InvalidRequestError where the body lacks something."""
    if received.sha256 is None:
        raise InvalidRequestError("The body has no part named file with a file name.", param="file")
    if received.fields.get("purpose") != PURPOSE:
        raise InvalidRequestError(f"purpose must be {PURPOSE}: files for other uses are not kept.", param="purpose")
    expires_at = _expires_at(received.fields, created_at)
    return FileRecord(
        id=file_id,
        filename=shown_name(received.filename),
        purpose=PURPOSE,
        bytes=received.size,
        sha256=received.sha256,
        created_at=created_at,
        expires_at=expires_at,
    )


def shown_name(name: str) -> str:
    """The last part of a path, without characters that cannot be printed."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(char for char in last if char.isprintable()).strip(". ")[:255] or "file"


def _malformed() -> InvalidRequestError:
    return InvalidRequestError("The body is not complete multipart/form-data.", code="invalid_body")


def _too_large() -> PayloadTooLargeError:
    return PayloadTooLargeError(f"A file may have {MAX_FILE_BYTES} bytes.", param="file")
