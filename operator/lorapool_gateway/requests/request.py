"""Reads `model` and `stream` from a request body, and nothing else. Pure.

The runtime validates every other field, and the body is forwarded unchanged. Runtimes report usage to the gateway in
SSE comments, so the client's `stream_options` are not needed.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass

from lorapool_api.openai import InvalidRequestError

MODEL_NAME_MAX = 256
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    route: str
    model: str
    stream: bool
    body: bytes
    tenant: str
    """Identifies the caller's tenant to runtimes (`HEADER_TENANT`)."""


def parse_request(route: str, body: bytes, tenant: str) -> InferenceRequest:
    """Raises InvalidRequestError naming what is wrong with the body."""
    try:
        fields = json.loads(body)
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.", code="invalid_json") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"The request body is not valid JSON: {_where(error)}.", code="invalid_json"
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("The request body must be a JSON object.", code="invalid_json")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("`model` is required and must be a string.", param="model", code="invalid_value")
    if len(model) > MODEL_NAME_MAX:
        raise InvalidRequestError(
            f"`model` must not be longer than {MODEL_NAME_MAX} characters.", param="model", code="invalid_value"
        )
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequestError("`stream` must be true or false.", param="stream", code="invalid_value")
    return InferenceRequest(route=route, model=model, stream=bool(stream), body=body, tenant=tenant)


def request_id(sent: str | None) -> str:
    """The client's request id if it is safe to log and to forward, else a new one."""
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent
    return f"req-{secrets.token_hex(12)}"


def _where(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return "a number in it is too long"
