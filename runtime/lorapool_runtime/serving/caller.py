"""Who sent a request, as the headers of the internal hop say it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from lorapool_api.common import HEADER_ATTEMPT, HEADER_USAGE
from lorapool_api.protocol import HEADER_TENANT
from lorapool_api.usage_protocol import HEADER_KEY, HEADER_PROJECT

ID_MAX = 128
SSE = "text/event-stream"

_NOT_PRINTED = re.compile(r"[^\x21-\x7e]")


@dataclass(frozen=True, slots=True)
class Caller:
    request_id: str
    attempt: str
    """No other request has it."""
    tenant: str = ""
    """Empty: not known."""
    wants_usage: bool = False
    """Whether it is sent the usage so far, with each step."""
    key_uid: str = ""
    """Uid of the Secret of the API key, as the gateway said it."""
    project: str = ""
    """The namespace that pays, as the gateway said it."""
    wants_events: bool = False
    """Whether it reads every answer as events, whose head is sent as soon as the request is admitted."""


def caller_of(headers: Mapping[str, str], request_id: str) -> Caller:
    wants_usage = headers.get(HEADER_USAGE) == "1"
    return Caller(
        request_id=request_id,
        attempt=_printed(headers.get(HEADER_ATTEMPT, ""), ID_MAX) or uuid.uuid4().hex,
        tenant=headers.get(HEADER_TENANT, "")[:ID_MAX],
        wants_usage=wants_usage,
        key_uid=_printed(headers.get(HEADER_KEY, ""), 64),
        project=_printed(headers.get(HEADER_PROJECT, ""), 63),
        wants_events=wants_usage and headers.get("Accept") == SSE,
    )


def _printed(value: str, most: int) -> str:
    """The value without characters that no identifier has: it is recorded."""
    return _NOT_PRINTED.sub("", value)[:most]
