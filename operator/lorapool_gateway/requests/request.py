"""Reads `model` and `stream` from a request body, and nothing else. Pure.

The runtime validates every other field, and the body is forwarded unchanged. The parser checks that the whole body is
JSON but makes no values of the other fields, so that 4 MiB of them take milliseconds of the event loop. As in the
runtime, the last of two fields of one name counts.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import msgspec

from lorapool_api.openai import InvalidRequestError
from lorapool_gateway.requests.body import HeldBody

MODEL_NAME_MAX = 256
_MODEL_MAX_BYTES = 2 + 6 * 2 * MODEL_NAME_MAX
"""JSON of a name of which each character is written as two escapes."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    route: str
    model: str
    stream: bool
    held: HeldBody
    tenant: str
    """Identifies the caller's tenant to runtimes (`HEADER_TENANT`)."""

    @property
    def body(self) -> bytes:
        return self.held.data


class _Fields(msgspec.Struct):
    model: msgspec.Raw = msgspec.Raw(b"null")
    stream: msgspec.Raw = msgspec.Raw(b"null")


_DECODER = msgspec.json.Decoder(_Fields)


def parse_request(route: str, held: HeldBody, tenant: str) -> InferenceRequest:
    """Raises InvalidRequestError naming what is wrong with the body."""
    model, stream = _read(held.data)
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("`model` is required and must be a string.", param="model", code="invalid_value")
    if len(model) > MODEL_NAME_MAX:
        raise _too_long()
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequestError("`stream` must be true or false.", param="stream", code="invalid_value")
    return InferenceRequest(route=route, model=model, stream=bool(stream), held=held, tenant=tenant)


def _read(body: bytes) -> tuple[object, object]:
    """The two fields, None where one is missing."""
    try:
        fields = _DECODER.decode(body)
        if len(fields.model) > _MODEL_MAX_BYTES:
            raise _too_long()
        return msgspec.json.decode(fields.model), msgspec.json.decode(fields.stream)
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.", code="invalid_json") from None
    except msgspec.ValidationError:
        raise InvalidRequestError("The request body must be a JSON object.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}.", code="invalid_json") from None


def _too_long() -> InvalidRequestError:
    return InvalidRequestError(
        f"`model` must not be longer than {MODEL_NAME_MAX} characters.", param="model", code="invalid_value"
    )


def request_id(sent: str | None) -> str:
    """The client's request id if it is safe to log and to forward, else a new one."""
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent
    return f"req-{os.urandom(12).hex()}"
