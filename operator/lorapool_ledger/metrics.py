"""The ledger's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lorapool_api.quota_protocol import Meter

Uses = Callable[[], Iterable[tuple[str, Meter, int, int]]]
MOST_QUOTAS = 20
"""Quotas of each kind that have a series: those that are used most."""
CHECKS = ("R1", "R2", "R3", "R4", "R5")


class _FullestQuotas(Collector):
    """How far the quotas are used that are used most; the others have no series."""

    def __init__(self) -> None:
        self.uses: Uses = lambda: ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "lorapool_ledger_quota_used_ratio",
            "Used part of a quota that gateways ask for: of each meter the 20 that are used most.",
            labels=("scope", "meter"),
        )
        shares: dict[Meter, list[tuple[float, str]]] = {}
        for scope, meter, limit, used in self.uses():
            shares.setdefault(meter, []).append((used / limit, scope))
        for meter, of_meter in shares.items():
            for share, scope in sorted(of_meter, reverse=True)[:MOST_QUOTAS]:
                family.add_metric((scope, meter.value), share)
        yield family


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._records = Counter(
            "lorapool_ledger_records_total",
            "Records committed, by the process that wrote them (gateway, runtime).",
            ("writer",),
            registry=self.registry,
        )
        self._lost = Counter(
            "lorapool_ledger_gaps_total",
            "Holes in the numbers of a writer's records, whose records never arrive.",
            ("writer",),
            registry=self.registry,
        )
        self._failures = Counter(
            "lorapool_ledger_intake_failures_total",
            "Batches of gateways and pages of runtimes that were not committed and are delivered again.",
            ("writer",),
            registry=self.registry,
        )
        self._commit = Histogram(
            "lorapool_ledger_commit_seconds",
            "Duration of one intake transaction, with its wait for the writer.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
            registry=self.registry,
        )
        self._unreconciled = Gauge(
            "lorapool_ledger_unreconciled_tokens",
            "Tokens (R3: nanoseconds) by which the two sides of a check differ at present.",
            ("check",),
            registry=self.registry,
        )
        self._findings = Gauge(
            "lorapool_ledger_findings",
            "Findings of a check at present. Those of `gap` and `twice` stay until their records' retention ends.",
            ("check",),
            registry=self.registry,
        )
        self._unknown = Gauge(
            "lorapool_ledger_unknown_attempts",
            "Attempts of the last day whose tokens are not known: the runtime was lost with its records.",
            registry=self.registry,
        )
        self.database_up = Gauge("lorapool_ledger_database_up", "1 while the database answers.", registry=self.registry)
        self.leading = Gauge(
            "lorapool_ledger_leading", "1 in the replica that collects and sums.", registry=self.registry
        )
        self.dirty_hours = Gauge(
            "lorapool_ledger_dirty_hours", "Hours whose sums are older than their facts.", registry=self.registry
        )
        self._pull_age = Gauge(
            "lorapool_ledger_pull_age_seconds",
            "Age of the last answer of the runtime that has not answered for longest.",
            registry=self.registry,
        )
        self._lag = Gauge(
            "lorapool_ledger_lag_seconds",
            "Age of the oldest records that a runtime or gateway has sent and whose sums are not made yet.",
            registry=self.registry,
        )
        self._checked = Gauge(
            "lorapool_ledger_checked_timestamp_seconds", "When the last reconciliation ended.", registry=self.registry
        )
        self._refused = Gauge(
            "lorapool_ledger_configuration_refused",
            "1 while the present list of prices or of sinks is refused; the one before stays valid.",
            ("file",),
            registry=self.registry,
        )
        self._outbox = Gauge(
            "lorapool_ledger_outbox_events",
            "Events that wait for a sink (waiting), and those of them that it has refused (refused).",
            ("sink", "state"),
            registry=self.registry,
        )
        self._delivered = Counter(
            "lorapool_ledger_sink_events_total",
            "Events sent to a sink, by result (delivered, failed, refused).",
            ("sink", "result"),
            registry=self.registry,
        )
        self._quotas = _FullestQuotas()
        self.registry.register(self._quotas)
        for check in CHECKS:
            self._unreconciled.labels(check).set(0)
        for file in ("prices", "sinks"):
            self._refused.labels(file).set(0)
        for writer in ("gateway", "runtime"):
            self._failures.labels(writer)

    def configuration_refused(self, file: str, refused: bool) -> None:
        """Shows whether the present `prices` or `sinks` can be used."""
        self._refused.labels(file).set(refused)

    def outbox(self, sink: str, waiting: int, refused: int) -> None:
        """Shows what waits for a sink."""
        self._outbox.labels(sink, "waiting").set(waiting)
        self._outbox.labels(sink, "refused").set(refused)

    def delivered(self, sink: str, result: str, events: int) -> None:
        """Counts events of one request to a sink."""
        self._delivered.labels(sink, result).inc(events)

    def committed(self, writer: str, records: int, seconds: float) -> None:
        """Counts one intake transaction."""
        self._records.labels(writer).inc(records)
        self._commit.observe(seconds)

    def gaps(self, writer: str, count: int) -> None:
        """Counts holes in the numbers of records."""
        self._lost.labels(writer).inc(count)

    def intake_failed(self, writer: str) -> None:
        """Counts a batch or page that was not committed."""
        self._failures.labels(writer).inc()

    def follow(self, pull_age_s: Callable[[], float], lag_s: Callable[[], float]) -> None:
        """Reads ages from here at each scrape."""
        self._pull_age.set_function(pull_age_s)
        self._lag.set_function(lag_s)

    def follow_quotas(self, uses: Uses) -> None:
        """Reads (scope, meter, limit, used) of quotas from here at each scrape, in another thread."""
        self._quotas.uses = uses

    def reconciled(
        self, tokens: Mapping[str, int], findings: Mapping[str, int], unknown_attempts: int, now_s: float
    ) -> None:
        """Shows the result of a reconciliation."""
        for check in CHECKS:
            self._unreconciled.labels(check).set(tokens.get(check, 0))
        for check in {*CHECKS, *findings}:
            self._findings.labels(check).set(findings.get(check, 0))
        self._unknown.set(unknown_attempts)
        self._checked.set(now_s)
