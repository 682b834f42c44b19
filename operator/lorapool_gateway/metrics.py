"""The gateway's Prometheus metrics. Label values come from objects only, never from a client's request.

Histograms have a label for the base only. Counters also have one for the adapter: at most `max_tracked_adapters`
adapters have their own series, all others share `__other__`. A deleted object's series are removed. Series begin at 0
as soon as their object is known, since `increase()` misses what a series counts before its first scrape.
"""

from __future__ import annotations

import contextlib
from collections import Counter as TallyOf
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from lorapool_api.common import BASE_TARGET
from lorapool_api.protocol import Usage
from lorapool_api.usage_protocol import AttemptEnd

UNKNOWN = "__unknown__"
OTHER = "__other__"
JOURNAL_LOSSES = ("full", "disk", "damaged", "torn")
TOKEN_TYPES = ("prompt", "completion", "cached")

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 30.0, 60.0, 300.0)
_DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300.0)


class OpenAttempt(Protocol):
    """An attempt that is recorded for the ledger."""

    def close(self, outcome: AttemptEnd, code: int, usage: Usage | None, cold_ms: int | None) -> None: ...


@dataclass(slots=True)
class RequestRecord:
    """Facts about one client request, filled in while it runs; passed to `Metrics.finish` exactly once."""

    started_s: float
    names: tuple[str, str] | None = None
    """Base and adapter (or `base`) as resolved; None while the model is unknown."""
    identity: str | None = None
    """Value of the adapter header of the response."""
    code: int = 500
    usage: Usage | None = None
    first_token_s: float | None = None
    cold_ms: int | None = None
    """Milliseconds that it was held or waited for its adapter; None when warm."""
    relaxed: str | None = None
    """Value of the response's header for keywords that are not enforced."""
    project: str = ""
    """The namespace that pays; empty while the model is unknown."""
    attempt: OpenAttempt | None = None
    """The attempt that is under way."""
    attempts: int = 0
    ended: AttemptEnd | None = None
    """How the attempt under way ended."""
    error: str | None = None
    """Code of the gateway's own error."""
    live: Callable[[], Usage | None] | None = None
    """What the answer under way has used so far."""

    def usage_so_far(self) -> Usage | None:
        return self.usage or (self.live() if self.live is not None else None)

    def close_attempt(self, outcome: AttemptEnd, code: int = 0) -> None:
        """Closes the attempt under way, if there is one. `code`: status of the client's response; 0: not sent yet."""
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            attempt.close(outcome, code, self.usage, self.cold_ms)

    def used(self, usage: Usage | None) -> None:
        """Records what the request has used, unless that is known already. None: not reported."""
        self.usage = self.usage or usage


@dataclass(slots=True)
class _Tracked:
    known: frozenset[str] = frozenset()
    series: dict[str, set[tuple[str, tuple[str, ...]]]] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    """Those whose series are all 0, oldest first."""


class Metrics:
    def __init__(self, max_tracked_adapters: int = 500) -> None:
        self._max_tracked = max_tracked_adapters
        self._adapters = _Tracked()
        self._bases = _Tracked()
        self._held: TallyOf[str] = TallyOf()
        self._children: dict[tuple[str, tuple[str, ...]], Any] = {}
        """Counters and histograms by (metric, labels). Looking one up in its family takes longer than counting does."""
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        name = "lorapool_gateway_"
        self.requests = Counter(
            f"{name}requests_total",
            "Requests by HTTP status; 499: the client disconnected; 502: a stream broke off.",
            ("base", "adapter", "code"),
            registry=self.registry,
        )
        self.tokens = Counter(
            f"{name}tokens_total",
            "Tokens as counted by the runtime; cached ones are part of prompt.",
            ("base", "adapter", "type"),
            registry=self.registry,
        )
        self.first_token = Histogram(
            f"{name}time_to_first_token_seconds",
            "From the request's arrival to the first streamed byte.",
            ("base", "start"),
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.duration = Histogram(
            f"{name}request_duration_seconds",
            "From the request's arrival to the last byte.",
            ("base", "start"),
            buckets=_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.activation = Histogram(
            f"{name}activation_seconds",
            "Time a request was held or waited for its adapter's load; warm requests are not counted.",
            ("base",),
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.held = Gauge(
            f"{name}held_requests", "Requests that wait for a replica.", ("base",), registry=self.registry
        )
        self.in_flight = Gauge(f"{name}in_flight_requests", "Requests under way.", registry=self.registry)
        self.held_body_bytes = Gauge(
            f"{name}held_body_bytes",
            "Bytes of request bodies that no runtime has accepted yet.",
            registry=self.registry,
        )
        self.refused_connections = Counter(
            f"{name}refused_connections_total",
            "Connections beyond the limit in all or of their address.",
            registry=self.registry,
        )
        self.retries = Counter(
            f"{name}retries_total",
            "Attempts that a runtime did not answer, by why; each was followed by another or by an error.",
            ("base", "reason"),
            registry=self.registry,
        )
        self.wakes = Counter(
            f"{name}wakes_total",
            "Times a base was scaled up for held requests.",
            ("base", "result"),
            registry=self.registry,
        )
        self.adapters = Gauge(f"{name}adapters", "LoraAdapters in the route table.", ("base",), registry=self.registry)
        self.key_last_used = Gauge(
            f"{name}key_last_used_timestamp_seconds",
            "When this gateway last accepted a request with an API key, by the name of its Secret; 0: not yet.",
            ("key",),
            registry=self.registry,
        )
        self.keys_age = Gauge(
            f"{name}keys_age_seconds",
            "Time since the API server last confirmed the API keys.",
            registry=self.registry,
        )
        self.journal_lag = Gauge(
            f"{name}journal_lag_seconds",
            "Age of the oldest record that the ledger does not have.",
            registry=self.registry,
        )
        self.journal_unsent = Gauge(
            f"{name}journal_unsent_records",
            "Records of this process that the ledger does not have.",
            registry=self.registry,
        )
        self.journal_bytes = Gauge(
            f"{name}journal_bytes", "Bytes of the journal, earlier processes' included.", registry=self.registry
        )
        self.journal_lost = Counter(
            f"{name}journal_lost_records_total",
            "Records that the ledger never gets. full: the journal was; disk: not written; damaged, torn: unreadable.",
            ("reason",),
            registry=self.registry,
        )
        for reason in JOURNAL_LOSSES:
            self.journal_lost.labels(reason)
        self.ledger_failures = Counter(
            f"{name}ledger_failures_total",
            "Batches of records that the ledger did not take at once.",
            registry=self.registry,
        )
        self.lease_failures = Counter(
            f"{name}lease_failures_total",
            "Calls for leases of quotas that the ledger did not answer.",
            registry=self.registry,
        )
        self.unpriced_requests = Counter(
            f"{name}unpriced_requests_total",
            "Requests refused since a budget of money lacks the price of the model, or is in another currency.",
            registry=self.registry,
        )
        self._keys: dict[str, Gauge] = {}
        """The series of each key, by its id."""
        self.watch_errors = Counter(
            f"{name}watch_errors_total", "Failed lists and watches.", ("kind",), registry=self.registry
        )

    def sync_keys(self, key_ids: Iterable[str]) -> None:
        """Adds and removes series so that there is one for each key."""
        now = frozenset(key_ids)
        for key_id in now - self._keys.keys():
            self._keys[key_id] = self.key_last_used.labels(key_id)
        for key_id in self._keys.keys() - now:
            self.key_last_used.remove(key_id)
            del self._keys[key_id]

    def key_used(self, key_id: str) -> None:
        """Records a request with this key."""
        if (series := self._keys.get(key_id)) is not None:  # else it was removed just now
            series.set_to_current_time()

    def finish(self, record: RequestRecord, now_s: float) -> None:
        """Counts one finished request."""
        base, adapter = self._labels(record.names)
        self._inc("requests", (base, adapter, str(record.code)))
        if record.names is None:
            return
        start = "warm" if record.cold_ms is None else "cold"
        self._observe("duration", (base, start), now_s - record.started_s)
        if record.first_token_s is not None:
            self._observe("first_token", (base, start), record.first_token_s - record.started_s)
        if record.cold_ms is not None:
            self._observe("activation", (base,), record.cold_ms / 1000)
        if record.usage is not None:
            for kind in TOKEN_TYPES:
                if tokens := getattr(record.usage, f"{kind}_tokens"):
                    self._inc("tokens", (base, adapter, kind), tokens)

    def hold(self, base: str, change: int) -> None:
        """Adds `change` to the number of held requests of a base."""
        self._held[base] += change
        if self._held[base] <= 0:
            del self._held[base]
        if base in self._bases.known:
            self.held.labels(base).set(self._held[base])
            self._note(self._bases, base, "held", (base,))

    def retry(self, base: str, reason: str) -> None:
        self._inc("retries", (base if base in self._bases.known else OTHER, reason))

    def wake(self, base: str, result: str) -> None:
        self._inc("wakes", (base if base in self._bases.known else OTHER, result))

    def connection_refused(self) -> None:
        self.refused_connections.inc()

    def journal_record_lost(self, reason: str) -> None:
        self.journal_lost.labels(reason).inc()

    def watch_failed(self, kind: str) -> None:
        """Counts a list or watch of this kind that failed."""
        self.watch_errors.labels(kind).inc()

    def sync(self, bases: Iterable[str], adapters: Mapping[str, str]) -> None:
        """Sets the objects that exist now, adapters as {adapter: base}; the series of all others are removed."""
        self._drop(self._bases, frozenset(bases))
        self._drop(self._adapters, frozenset(adapters))
        counts = dict.fromkeys(self._bases.known, 0)
        for base in adapters.values():
            if base in counts:
                counts[base] += 1
        for base, count in counts.items():
            self.adapters.labels(base).set(count)
            self._note(self._bases, base, "adapters", (base,))
            self._begin_at_zero(base, BASE_TARGET)
        for adapter, base in adapters.items():
            if adapter not in self._adapters.series and len(self._adapters.series) < self._max_tracked:
                self._adapters.series[adapter] = set()
                self._adapters.unused[adapter] = None
            if adapter in self._adapters.series and base in self._bases.known:
                self._begin_at_zero(base, adapter)

    def _begin_at_zero(self, base: str, adapter: str) -> None:
        for metric, last in (("requests", "200"), *(("tokens", kind) for kind in TOKEN_TYPES)):
            if (metric, (base, adapter, last)) not in self._children:
                self._child(metric, (base, adapter, last))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _labels(self, names: tuple[str, str] | None) -> tuple[str, str]:
        if names is None:
            return UNKNOWN, UNKNOWN
        base, adapter = names
        base = base if base in self._bases.known else OTHER
        if adapter == BASE_TARGET:
            return base, adapter
        if adapter not in self._adapters.known:
            return base, OTHER  # deleted while the request ran
        self._adapters.unused.pop(adapter, None)
        if adapter not in self._adapters.series:
            if len(self._adapters.series) >= self._max_tracked and not self._drop_unused():
                return base, OTHER
            self._adapters.series[adapter] = set()
        return base, adapter

    def _drop_unused(self) -> bool:
        """Removes the series of one adapter that was never used, to make room for one that is."""
        oldest = next(iter(self._adapters.unused), None)
        if oldest is None:
            return False
        self._remove(self._adapters, oldest)
        return True

    def _inc(self, metric: str, labels: tuple[str, ...], amount: float = 1) -> None:
        counter: Counter = self._children.get((metric, labels)) or self._child(metric, labels)
        counter.inc(amount)

    def _observe(self, metric: str, labels: tuple[str, ...], value: float) -> None:
        histogram: Histogram = self._children.get((metric, labels)) or self._child(metric, labels)
        histogram.observe(max(0.0, value))

    def _child(self, metric: str, labels: tuple[str, ...]) -> Any:
        """Creates a series and records its owners, so that it is removed together with them."""
        child = self._children[metric, labels] = getattr(self, metric).labels(*labels)
        self._note(self._bases, labels[0], metric, labels)
        if len(labels) > 2 and labels[1] in self._adapters.series:
            self._adapters.series[labels[1]].add((metric, labels))
        return child

    @staticmethod
    def _note(tracked: _Tracked, owner: str, metric: str, labels: tuple[str, ...]) -> None:
        if owner in tracked.known:
            tracked.series.setdefault(owner, set()).add((metric, labels))

    def _drop(self, tracked: _Tracked, known: frozenset[str]) -> None:
        for gone in [owner for owner in tracked.series if owner not in known]:
            self._remove(tracked, gone)
        tracked.known = known

    def _remove(self, tracked: _Tracked, owner: str) -> None:
        tracked.unused.pop(owner, None)
        for metric, labels in tracked.series.pop(owner):
            # A base and its adapter may both own a series; it is removed with the first of the two.
            self._children.pop((metric, labels), None)
            family: Counter | Gauge | Histogram = getattr(self, metric)
            with contextlib.suppress(KeyError):
                family.remove(*labels)
