"""Uploaded files: records in the store that say what the bytes next to them are.

    files/<id>            the bytes
    file-info/<id>.json   the record, written when the bytes are complete; a file exists while its record does

A deleted file's record goes first, then its bytes. What expires is deleted by the store; it is hidden from then on.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import string
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from pydantic import Field, ValidationError

from lorapool_api.common import ApiModel
from lorapool_api.openai import InvalidRequestError, ServerError, UnknownFileError
from lorapool_api.store_protocol import StoredObject
from lorapool_gateway.tuning.pages import listed, page
from lorapool_gateway.tuning.store_client import ObjectNotFoundError, StoreClient

PURPOSE = "fine-tune"
MAX_FILES = 10_000
KEPT_RECORDS = 20_000
CONCURRENT_READS = 16
_ID = re.compile(r"file-[A-Za-z0-9]{24}")
_ALPHABET = string.ascii_letters + string.digits


class FileRecord(ApiModel):
    """What the store knows of a file besides its bytes."""

    id: str
    filename: str = Field(max_length=255)
    """As the client called it, without folders; only shown."""
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    """Unix seconds."""
    expires_at: int | None = None
    """Unix seconds."""

    def shown(self) -> dict[str, Any]:
        """The file object of the API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Files:
    """The files of all organizations; every method acts in one namespace."""

    def __init__(self, store: StoreClient, *, now_unix_s: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now_unix_s = now_unix_s
        self._records: OrderedDict[tuple[str, str, str], FileRecord] = OrderedDict()
        """By namespace, key and version, the least recently used first."""

    def new_id(self) -> str:
        """An id that no other file has."""
        return "file-" + "".join(secrets.choice(_ALPHABET) for _ in range(24))

    async def write(
        self, namespace: str, file_id: str, body: AsyncIterator[bytes], expires_at: int | None
    ) -> StoredObject:
        """Stores the bytes of a file that does not exist yet."""
        return await self._store.put(namespace, _data(file_id), body, expires_unix_s=expires_at)

    async def discard(self, namespace: str, file_id: str) -> None:
        """Deletes the bytes of a file that is not going to exist."""
        await self._store.delete(namespace, _data(file_id))

    async def publish(self, namespace: str, record: FileRecord) -> None:
        """Makes a file whose bytes are stored exist."""
        body = record.model_dump_json(by_alias=True).encode()
        await self._store.put(namespace, _info(record.id), body, expires_unix_s=record.expires_at)

    async def find(self, namespace: str, file_id: str) -> FileRecord:
        """Raises UnknownFileError for an unknown file and one of another namespace alike."""
        if not _ID.fullmatch(file_id):
            raise UnknownFileError(file_id)
        try:
            record = FileRecord.model_validate_json(await self._store.get(namespace, _info(file_id)))
        except ObjectNotFoundError:
            raise UnknownFileError(file_id) from None
        if self._expired(record):
            raise UnknownFileError(file_id)
        return record

    async def listing(self, namespace: str, query: Mapping[str, str]) -> dict[str, Any]:
        """One page of the files, the newest first unless `order` is asc."""
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequestError("order must be asc or desc.", param="order")
        records = await self._all(namespace)
        wanted = [item for item in records if query.get("purpose", item.purpose) == item.purpose]
        wanted.sort(key=lambda item: (item.created_at, item.id), reverse=order == "desc")
        found, more = page(wanted, query, lambda item: item.id, default=MAX_FILES, most=MAX_FILES)
        return listed([item.shown() for item in found], more)

    async def delete(self, namespace: str, file_id: str) -> dict[str, Any]:
        """Deletes record and bytes. Raises UnknownFileError."""
        await self.find(namespace, file_id)
        await self._store.delete(namespace, _info(file_id))
        await self._store.delete(namespace, _data(file_id))
        return {"id": file_id, "object": "file", "deleted": True}

    @asynccontextmanager
    async def open(self, namespace: str, file_id: str) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Size and bytes of a file. Raises UnknownFileError."""
        await self.find(namespace, file_id)
        async with self.open_object(namespace, _data(file_id), file_id) as found:
            yield found

    @asynccontextmanager
    async def open_object(
        self, namespace: str, key: str, file_id: str
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Size and bytes of any object, under the id that a client knows it by. Raises UnknownFileError."""
        try:
            async with self._store.open(namespace, key) as response:
                yield int(response.headers["Content-Length"]), response.content.iter_any()
        except ObjectNotFoundError:
            raise UnknownFileError(file_id) from None

    async def _all(self, namespace: str) -> list[FileRecord]:
        objects = await self._store.list(namespace, "file-info/")
        permits = asyncio.Semaphore(CONCURRENT_READS)
        found = await asyncio.gather(*(self._record(namespace, item, permits) for item in objects))
        return [record for record in found if record is not None and not self._expired(record)]

    async def _record(self, namespace: str, item: StoredObject, permits: asyncio.Semaphore) -> FileRecord | None:
        """The record of a listed object; None if it was deleted meanwhile."""
        known = (namespace, item.key, item.etag)
        record = self._records.pop(known, None)
        if record is None:
            async with permits:
                try:
                    record = FileRecord.model_validate_json(await self._store.get(namespace, item.key))
                except ObjectNotFoundError:
                    return None
                except ValidationError as error:
                    raise ServerError("A record of a file cannot be read.") from error
        self._records[known] = record
        if len(self._records) > KEPT_RECORDS:
            self._records.popitem(last=False)
        return record

    def _expired(self, record: FileRecord) -> bool:
        return record.expires_at is not None and self._now_unix_s() >= record.expires_at


def _data(file_id: str) -> str:
    return f"files/{file_id}"


def _info(file_id: str) -> str:
    return f"file-info/{file_id}.json"
