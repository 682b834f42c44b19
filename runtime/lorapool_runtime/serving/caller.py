"""Who sent a request, as the headers of the internal hop say it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from lorapool_api.common import HEADER_ATTEMPT, HEADER_USAGE
from lorapool_api.protocol import HEADER_TENANT

ID_MAX = 128
SSE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Caller:
    request_id: str
    attempt: str
    """No other request has it."""
    tenant: str = ""
    """Empty: not known."""
    wants_usage: bool = False
    """Whether it is sent the usage so far, with each step."""
    wants_events: bool = False
    """Whether it reads every answer as events, whose head is sent as soon as the request is admitted."""


def caller_of(headers: Mapping[str, str], request_id: str) -> Caller:
    wants_usage = headers.get(HEADER_USAGE) == "1"
    return Caller(
        request_id=request_id,
        attempt=headers.get(HEADER_ATTEMPT, "")[:ID_MAX] or uuid.uuid4().hex,
        tenant=headers.get(HEADER_TENANT, "")[:ID_MAX],
        wants_usage=wants_usage,
        wants_events=wants_usage and headers.get("Accept") == SSE,
    )
