"""What a runtime's error response means for the request: another replica, or the client's error. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lorapool_api.openai import CODE_DRAINING, CODE_NO_SLOT, CODE_NOT_REGISTERED, CODE_QUEUE_FULL, CODE_STARTING


class Refusal(StrEnum):
    """Why a runtime did not admit a request. Nothing was generated."""

    CONNECT = "connect"
    LOST = "lost"
    """The connection was lost after the request was sent and before the runtime reported that it admitted it."""
    SILENT = "silent"
    """The same for a pod that has left the table or whose polls fail: it was left without waiting any longer."""
    DRAINING = "draining"
    STARTING = "starting"
    QUEUE_FULL = "queue_full"
    NO_SLOT = "no_slot"
    UNAUTHORIZED = "unauthorized"
    NOT_REGISTERED = "not_registered"


@dataclass(slots=True)
class Passed:
    """An error response of the runtime that is passed on to the client."""

    status: int
    body: bytes
    retry_after: str | None


def sort_error(status: int, body: bytes, retry_after: str | None) -> Refusal | Passed | None:
    """None: not a response of the protocol."""
    match status, _code(body):
        case 404, code if code == CODE_NOT_REGISTERED:
            return Refusal.NOT_REGISTERED
        case 409, code if code == CODE_NO_SLOT:
            return Refusal.NO_SLOT
        case 503, code if code == CODE_DRAINING:
            return Refusal.DRAINING
        case 503, code if code == CODE_STARTING:
            return Refusal.STARTING
        case 429, code if code == CODE_QUEUE_FULL:
            return Refusal.QUEUE_FULL
        case 401 | 403, _:
            return Refusal.UNAUTHORIZED
        case 400 | 413 | 422 | 429 | 500 | 503, str():
            return Passed(status, body, retry_after)
    return None


def _code(body: bytes) -> str | None:
    """`error.code`, or `error.type` if the code is null, of an OpenAI error body; None for any other body."""
    try:
        answer: Any = json.loads(body)
        error = answer["error"]
        code = error["code"] or error["type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return code if isinstance(code, str) else None
