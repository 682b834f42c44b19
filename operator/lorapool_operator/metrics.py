"""The metrics `lorapool_operator_*`, and the HTTP app that serves them with /healthz and /readyz.

Series of objects are read from the caches at the time of the scrape, so they exist from the object's creation and
disappear with it. The usage of each adapter is that of its status: unlike the counters of gateway and runtime, the
totals survive every process, so that a bill can be made of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from lorapool_api.common import AdapterCondition
from lorapool_api.loraadapter import UsageStatus
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_operator.decisions.usage import COUNTERS
from lorapool_operator.effects.cluster import Cluster
from lorapool_operator.effects.inspections import InspectionTracker
from lorapool_operator.effects.namespace_reports import NamespaceReports
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import ClusterCache, Key, ObjectKind, find_condition

BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
UNKNOWN_STATE = "Pending"
STATUSES = ("True", "False", "Unknown")
OTHER = "__other__"
"""Name of the series that the adapters of a namespace share beyond the bound; no adapter can have it."""

Metric = GaugeMetricFamily | CounterMetricFamily


class Metrics:
    """The registry, and the counters that are incremented where the counted things happen."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._reconciles = Counter(
            "lorapool_operator_reconciles",
            "Keys that were observed, planned and applied.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self._durations = Histogram(
            "lorapool_operator_reconcile_duration_seconds",
            "Time to observe, plan and apply one key.",
            ["kind"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.resyncs = Counter(
            "lorapool_operator_resyncs", "Comparisons of the caches with the API server.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.repairs = Counter(
            "lorapool_operator_resync_repairs", "Objects that a watch had missed.", registry=self.registry
        )
        self.authority_expiry = Gauge(
            "lorapool_operator_authority_expiry_timestamp_seconds",
            "When the authority of the runtimes' certificates expires, in Unix time; 0 while the internal TLS is off.",
            registry=self.registry,
        )
        self._durations_of = {kind: self._durations.labels(kind.value) for kind in ObjectKind}
        self._reconciles_of = {
            (kind, outcome): self._reconciles.labels(kind.value, outcome)
            for kind in ObjectKind
            for outcome in ("done", "conflict", "error")
        }

    def reconciled(self, kind: ObjectKind, outcome: str, seconds: float) -> None:
        self._reconciles_of[kind, outcome].inc()
        self._durations_of[kind].observe(seconds)


class ScrapeCollector(Collector):
    """Series that are made at each scrape: none is known when the collector is registered."""

    def describe(self) -> list[Metric]:
        return []


class StateCollector(ScrapeCollector):
    """Gauges of the present state of caches, queue and trackers. Is read in a thread of its own."""

    def __init__(
        self,
        cache: ClusterCache,
        queue: WorkQueue[Key],
        inspections: InspectionTracker,
        runtimes: RuntimeTracker,
        cluster: Cluster,
        namespaces: NamespaceReports,
        *,
        leading: Callable[[], bool],
        max_tracked_adapters: int,
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._inspections = inspections
        self._runtimes = runtimes
        self._cluster = cluster
        self._namespaces = namespaces
        self._leading = leading
        self._max_tracked_adapters = max_tracked_adapters

    def collect(self) -> Iterator[Metric]:
        yield _gauge("leader", "1 when this process holds the Lease.", float(self._leading()))
        yield _gauge("queue_depth", "Keys that are due.", float(self._queue.ready_depth()))
        yield _gauge(
            "queue_oldest_age_seconds", "How long the most overdue key has waited.", self._queue.oldest_age_s()
        )
        yield _gauge("inspections_waiting", "Queued and running inspections.", float(self._inspections.waiting()))
        yield _counter("inspections_total", "Finished inspections of sources.", "reason", self._inspections.outcomes)
        yield _counter("api_writes_total", "Writes to the API server.", "what", self._cluster.writes)
        polls = {"done": self._runtimes.polls, "failed": self._runtimes.poll_failures}
        yield _counter("runtime_polls_total", "Long-polls of runtimes.", "outcome", polls)
        failures = self._namespaces.failures
        yield _counter("namespace_watch_failures_total", "Failed listings and watches.", "watched_namespace", failures)
        yield self._namespaces_failing()
        yield from self._bases()
        yield from self._adapters()

    def _namespaces_failing(self) -> Metric:
        family = GaugeMetricFamily(
            "lorapool_operator_namespace_failing",
            "1 while a watched namespace cannot be listed or watched; its objects are kept as last known.",
            labels=["watched_namespace"],
        )
        for namespace in tuple(self._namespaces.failures):
            family.add_metric([namespace], float(namespace in self._namespaces.failing))
        return family

    def _bases(self) -> Iterator[Metric]:
        names = ["base"]  # `namespace/name`, as gateway and runtime spell it: a join needs no relabelling
        conditions = GaugeMetricFamily(
            "lorapool_operator_base_condition",
            "1 for the present status of each condition.",
            labels=[*names, "type", "status"],
        )
        wanted = GaugeMetricFamily("lorapool_operator_base_replicas_wanted", "spec.replicas.", labels=names)
        exist = GaugeMetricFamily("lorapool_operator_base_replicas", "Runtime pods that exist.", labels=names)
        ready = GaugeMetricFamily("lorapool_operator_base_replicas_ready", "Runtime pods that serve.", labels=names)
        for base in self._cache.bases:
            at = [f"{base.meta.namespace}/{base.meta.name}"]
            wanted.add_metric(at, float(base.spec.replicas or 0))
            exist.add_metric(at, float(base.status.replicas))
            ready.add_metric(at, float(base.status.ready_replicas))
            for item in base.status.conditions:
                for status in STATUSES:
                    conditions.add_metric([*at, item.type, status], float(item.status == status))
        yield from (conditions, wanted, exist, ready)

    def _adapters(self) -> Iterator[Metric]:
        states: Tally[tuple[str, str]] = Tally()
        usage, others = UsageFamilies(), dict[tuple[str, str], Tally[str]]()
        ready = GaugeMetricFamily(
            "lorapool_operator_adapter_ready",
            "1 when the adapter is Ready; exported for the oldest max_tracked_adapters only.",
            labels=["adapter"],
        )
        oldest_first = sorted(self._cache.adapters, key=lambda item: (item.meta.created_unix_s, item.meta.uid))
        for number, adapter in enumerate(oldest_first):
            base, counted = str(adapter.base_key), adapter.status.usage or UsageStatus()
            states[base, adapter.status.state or UNKNOWN_STATE] += 1
            if number < self._max_tracked_adapters:
                condition = find_condition(adapter.status.conditions, AdapterCondition.READY)
                is_ready = condition is not None and condition.status == "True"
                ready.add_metric([str(adapter.key)], float(is_ready))
                usage.add(base, str(adapter.key), counted)
            else:
                shared = others.setdefault((base, f"{adapter.meta.namespace}/{OTHER}"), Tally())
                shared.update({name: getattr(counted, name) for name in COUNTERS})
        for (base, name), total in sorted(others.items()):
            usage.add(base, name, UsageStatus.model_validate(total))
        counts = GaugeMetricFamily(
            "lorapool_operator_adapters", "LoraAdapters by base and state.", labels=["base", "state"]
        )
        for labels, count in sorted(states.items()):
            counts.add_metric(list(labels), float(count))
        yield from (counts, ready, *usage.families)


class UsageFamilies:
    """The usage of adapters since each was created, as its status has it."""

    def __init__(self) -> None:
        self._requests = _usage("requests", "Ended requests.", "outcome")
        self._tokens = _usage("tokens", "Tokens of prompts and completions.", "type")
        self._loads = _usage("loads", "Loads into a slot.")
        self._load_seconds = _usage("load_seconds", "Time spent on loads.")
        self._residency_seconds = _usage("residency_seconds", "Time on a device, summed over replicas.")
        self.families: tuple[Metric, ...] = (
            self._requests,
            self._tokens,
            self._loads,
            self._load_seconds,
            self._residency_seconds,
        )

    def add(self, base: str, adapter: str, usage: UsageStatus) -> None:
        at = [base, adapter]
        completed = usage.requests - usage.failed_requests - usage.cancelled_requests
        self._requests.add_metric([*at, "completed"], float(completed))
        self._requests.add_metric([*at, "failed"], float(usage.failed_requests))
        self._requests.add_metric([*at, "cancelled"], float(usage.cancelled_requests))
        self._tokens.add_metric([*at, "prompt"], float(usage.prompt_tokens))
        self._tokens.add_metric([*at, "completion"], float(usage.completion_tokens))
        self._loads.add_metric(at, float(usage.loads))
        self._load_seconds.add_metric(at, usage.load_seconds)
        self._residency_seconds.add_metric(at, usage.residency_seconds)


def _usage(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(
        f"lorapool_operator_adapter_{name}",
        f"{text} Totals since the adapter was created; those beyond max_tracked_adapters share <namespace>/{OTHER}.",
        labels=["base", "adapter", *labels],
    )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lorapool_operator_{name}", text, value=value)


def _counter(name: str, text: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"lorapool_operator_{name}", text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], float(value))
    return family


def status_app(
    registry: CollectorRegistry, access: MetricsAccess, *, healthy: Callable[[], str], ready: Callable[[], str]
) -> web.Application:
    """Returns the app. `healthy` and `ready` return what is wrong, or "": then the probe succeeds."""

    async def show(request: web.Request) -> web.Response:
        if not access.permits(request.headers.get("Authorization")):
            return web.Response(status=401)
        body = await asyncio.to_thread(generate_latest, registry)  # series of thousands of adapters take long
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def probe(check: Callable[[], str]) -> Callable[[web.Request], object]:
        async def respond(_: web.Request) -> web.Response:
            problem = check()
            return web.Response(text=problem or "ok", status=503 if problem else 200)

        return respond

    app = web.Application()
    app.router.add_get("/metrics", show)
    app.router.add_get("/healthz", probe(healthy))  # type: ignore[arg-type]  # aiohttp's handler type is a private union
    app.router.add_get("/readyz", probe(ready))  # type: ignore[arg-type]  # the same
    return app
