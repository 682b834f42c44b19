"""What an event looks like for each type of sink, and how several are posted. Pure.

The text of an event is made once and kept in the outbox, so that every delivery has the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from lorapool_ledger.billing.invoice import Correction
from lorapool_ledger.sinks.config import Meter, Sink, SinkType

MOST = {SinkType.CLOUDEVENTS: 100, SinkType.LAGO: 100, SinkType.STRIPE: 1}
"""Events of one request at most."""
_EVENT_TYPE, _CORRECTION_TYPE = "dev.lorapool.usage", "dev.lorapool.correction"


@dataclass(frozen=True, slots=True)
class Usage:
    """A billed attempt, or a remainder of several requests."""

    attempt: str
    """The attempt's id; of a remainder, its process and number."""
    ended_unix_ms: int
    project: str
    key_uid: str
    model: str
    outcome: str
    counts: Mapping[Meter, int]


@dataclass(frozen=True, slots=True)
class Event:
    event_id: str
    """Attempt and meter, or that of a correction: the same whenever the event is made."""
    body: str


@dataclass(frozen=True, slots=True)
class Post:
    headers: Mapping[str, str]
    data: bytes


def events_of(sink: Sink, usage: Usage) -> list[Event]:
    """The events of an attempt, one for each meter that the sink wants and that has counted anything."""
    wanted = [(meter, usage.counts.get(meter, 0)) for meter in sink.meters]
    return [
        Event(event_id, _SHAPES[sink.type](sink, usage, meter, value, event_id))
        for meter, value in wanted
        if value and (event_id := f"{usage.attempt}-{meter}")
    ]


def correction_event(sink: Sink, found: Correction, key_uid: str) -> Event | None:
    """The event of a correction, whose value is its amount; None where the sink wants or takes none."""
    if Meter.CORRECTIONS not in sink.meters or sink.type is SinkType.STRIPE:
        return None
    event_id, at_ms = f"correction-{found.correction_id}", found.recorded_unix_s * 1000
    named = {"currency": found.currency, "model": found.model, "api_key_id": key_uid, "reason": found.reason}
    value = format(found.amount, "f")
    if sink.type is SinkType.LAGO:
        properties = {"value": value, **named}
        return Event(event_id, _lago_event(sink, found.project, Meter.CORRECTIONS, at_ms, event_id, properties))
    tokens = {name: getattr(found, name) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")}
    data = {"meter": Meter.CORRECTIONS.value, "value": value, "project": found.project, **named, **tokens}
    data["concerns"] = _moment(found.concerns_unix_s * 1000)
    return Event(event_id, _cloud_event(sink, found.project, _CORRECTION_TYPE, at_ms, event_id, data))


def _cloudevent(sink: Sink, usage: Usage, meter: Meter, value: int, event_id: str) -> str:
    data = {
        "meter": meter.value,
        "value": value,
        "project": usage.project,
        "model": usage.model,
        "api_key_id": usage.key_uid,
        "outcome": usage.outcome,
    }
    return _cloud_event(sink, usage.project, _EVENT_TYPE, usage.ended_unix_ms, event_id, data)


def _cloud_event(sink: Sink, project: str, kind: str, at_ms: int, event_id: str, data: Mapping[str, Any]) -> str:
    return _json(
        {
            "specversion": "1.0",
            "id": event_id,
            "source": "lorapool/ledger",
            "type": kind,
            "subject": sink.subject(project),
            "time": _moment(at_ms),
            "datacontenttype": "application/json",
            "data": data,
        }
    )


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _lago(sink: Sink, usage: Usage, meter: Meter, value: int, event_id: str) -> str:
    properties = {"value": value, "model": usage.model, "api_key_id": usage.key_uid}
    return _lago_event(sink, usage.project, meter, usage.ended_unix_ms, event_id, properties)


def _lago_event(sink: Sink, project: str, meter: Meter, at_ms: int, event_id: str, values: Mapping[str, Any]) -> str:
    return _json(
        {
            "transaction_id": event_id,
            "external_subscription_id": sink.subject(project),
            "code": f"lorapool_{meter}",
            "timestamp": f"{at_ms // 1000}.{at_ms % 1000:03d}",
            "properties": values,
        }
    )


def _stripe(sink: Sink, usage: Usage, meter: Meter, value: int, event_id: str) -> str:
    return urlencode(
        {
            "event_name": f"lorapool_{meter}",
            "identifier": event_id,
            "timestamp": usage.ended_unix_ms // 1000,
            "payload[stripe_customer_id]": sink.subject(usage.project),
            "payload[value]": value,
        }
    )


_SHAPES = {SinkType.CLOUDEVENTS: _cloudevent, SinkType.LAGO: _lago, SinkType.STRIPE: _stripe}


def _json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, separators=(",", ":"), ensure_ascii=False)


def post_of(sink: Sink, events: Sequence[Event], token: str) -> Post:
    """The request that delivers these events, at most `MOST` of the sink's type."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    bodies = ",".join(event.body for event in events)
    if sink.type is SinkType.CLOUDEVENTS:
        return Post(headers | {"Content-Type": "application/cloudevents-batch+json"}, f"[{bodies}]".encode())
    if sink.type is SinkType.LAGO:
        return Post(headers | {"Content-Type": "application/json"}, f'{{"events":[{bodies}]}}'.encode())
    [event] = events
    # With this header, Stripe repeats its first answer for a day instead of refusing the identifier as used.
    headers |= {"Content-Type": "application/x-www-form-urlencoded", "Idempotency-Key": event.event_id}
    return Post(headers, event.body.encode())


def known_already(sink: Sink, status: int, answer: str, count: int) -> frozenset[int]:
    """Places of the events that the sink refused because it has them. Lago refuses the whole batch for one of them."""
    if sink.type is not SinkType.LAGO or status != 422:
        return frozenset()
    try:
        details = json.loads(answer).get("error_details")
    except (ValueError, AttributeError):
        return frozenset()
    if not isinstance(details, dict):
        return frozenset()
    by_place = {"0": details} if count == 1 and "transaction_id" in details else details
    return frozenset(
        place
        for place in range(count)
        if isinstance(one := by_place.get(str(place)), dict) and one.get("transaction_id") == ["value_already_exist"]
    )
