"""Every metric of the runtime, on a registry of its own.

Histograms are labelled by base only. The numbers of one adapter are read from `usage` at each scrape, so its series
vanish with it. The `vllm:` names are those that inference gateways already read; our own names have no colon. A name
that a client made up never becomes a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from lorapool_api.common import FailureReason
from lorapool_api.openai import CODE_NO_SLOT, CODE_QUEUE_FULL
from lorapool_api.protocol import Tier, Usage
from lorapool_runtime.accounts.journal import JournalStats
from lorapool_runtime.accounts.usage import OTHER, AdapterUsage, Outcome, UsageTracker
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import DecodeProgramState

_TTFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_INTER_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_DURATION = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


@dataclass(frozen=True, slots=True)
class Gauges:
    """The state of the runtime at one moment."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    slots_total: int = 0
    slots_used: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    registered: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    ready: bool = False
    draining: bool = False
    running_adapters: Sequence[str] = ()
    waiting_adapters: Sequence[str] = ()
    decode_program: DecodeProgramState | None = None
    journal: JournalStats = field(default_factory=JournalStats)


class Metrics:
    def __init__(self, base: str, usage: UsageTracker, clock: Clock) -> None:
        self._base = base
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which no dashboard reads
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = Counter(
            "lorapool_runtime_requests",
            "Requests that ended, of the base and of all adapters.",
            ["base", "outcome"],
            registry=self._registry,
        )
        self._rejected = Counter(
            "lorapool_runtime_rejected_requests",
            "Requests refused before anything was computed, by error code.",
            ["base", "code"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "lorapool_runtime_tokens",
            "Tokens of requests that ended, of the base and of all adapters.",
            ["base", "type"],
            registry=self._registry,
        )
        self._cached_tokens = Counter(
            "lorapool_runtime_cached_tokens",
            "Prompt tokens of requests that ended that were not computed again, of the base and of all adapters.",
            ["base"],
            registry=self._registry,
        )
        ttft = self._histogram("time_to_first_token", "From the request's arrival to its first token.", _TTFT)
        inter_token = self._histogram("inter_token", "From one delta of a response to the next.", _INTER_TOKEN)
        self._first_token, self._next_token = (
            ttft.labels(base),
            inter_token.labels(base),
        )  # looked up once, not per token
        self._duration = self._histogram("request_duration", "From the request's arrival to its end.", _DURATION)
        self._load_seconds = Histogram(
            "lorapool_runtime_load_seconds",
            "Loads of adapters into a slot, by the tier they came from.",
            ["base", "tier"],
            buckets=_DURATION,
            registry=self._registry,
        )
        self._load_failures = Counter(
            "lorapool_runtime_load_failures",
            "Loads that failed, by reason.",
            ["base", "reason"],
            registry=self._registry,
        )
        self._begin_at_zero()
        self.gauges: Callable[[], Gauges] = Gauges
        """Returns the present state. Set by the runtime that owns the metrics."""
        self._registry.register(_GaugeCollector(base, usage, clock, lambda: self.gauges()))
        self._gateway_names = CollectorRegistry()
        self._gateway_names.register(_InferenceGatewayCollector(base, clock, lambda: self.gauges()))

    def _begin_at_zero(self) -> None:
        """Creates the series that are known beforehand: `increase()` misses what a series counts before its first
        scrape."""
        for outcome in (Outcome.COMPLETED, Outcome.FAILED, Outcome.CANCELLED):
            self._requests.labels(self._base, outcome.value)
        for kind in ("prompt", "completion"):
            self._tokens.labels(self._base, kind)
        self._cached_tokens.labels(self._base)
        for code in (CODE_NO_SLOT, CODE_QUEUE_FULL):
            self._rejected.labels(self._base, code)
        for tier in (Tier.HOST, Tier.DISK, Tier.SOURCE):
            self._load_seconds.labels(self._base, tier.value)
        for reason in FailureReason:
            self._load_failures.labels(self._base, reason.value)
        self._duration.labels(self._base)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"lorapool_runtime_{name}_seconds", help_text, ["base"], buckets=buckets, registry=self._registry
        )

    def render(self) -> bytes:
        """All metrics under our own names; they pass `promtool check metrics`."""
        return generate_latest(self._registry)

    def render_gateway_names(self) -> bytes:
        """The metrics under the names that inference gateways read."""
        return generate_latest(self._gateway_names)

    def ended(self, outcome: Outcome, usage: Usage, seconds: float) -> None:
        self._requests.labels(self._base, outcome.value).inc()
        self._tokens.labels(self._base, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(self._base, "completion").inc(usage.completion_tokens)
        self._cached_tokens.labels(self._base).inc(usage.cached_tokens)
        self._duration.labels(self._base).observe(seconds)

    def rejected(self, code: str) -> None:
        """`code` is one of our own error codes."""
        self._rejected.labels(self._base, code).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next_token.observe(seconds)

    def loaded(self, seconds: float, tier: Tier) -> None:
        self._load_seconds.labels(self._base, tier.value).observe(seconds)

    def load_failed(self, reason: FailureReason) -> None:
        self._load_failures.labels(self._base, reason.value).inc()


class _GaugeCollector:
    """Collects the state at the moment of the scrape."""

    def __init__(self, base: str, usage: UsageTracker, clock: Clock, gauges: Callable[[], Gauges]) -> None:
        self._base = base
        self._usage = usage
        self._clock = clock
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        now = self._gauges()
        yield from self._own_gauges(now)
        yield from self._per_adapter()

    def _own_gauges(self, now: Gauges) -> Iterator[Metric]:
        for name, help_text, value in (
            ("running_requests", "Sequences the engine computes.", now.running),
            ("waiting_requests", "Sequences and requests that wait, for the engine or for a load.", now.waiting),
            ("kv_usage_ratio", "Used fraction of the KV cache.", now.kv_usage),
            ("slots", "Adapter slots on the device.", now.slots_total),
            ("used_slots", "Slots in use.", now.slots_used),
            ("device_bytes", "Bytes the engine holds on its device.", now.device_bytes),
            (
                "host_cache_bytes",
                "Bytes of adapters kept in host memory; on a CPU those in a slot are the same bytes.",
                now.host_bytes,
            ),
            ("registered_adapters", "Adapters registered with this runtime.", now.registered),
            ("ready", "1 when requests are accepted.", int(now.ready)),
            ("draining", "1 while the runtime drains before it stops.", int(now.draining)),
            ("usage_records", "Usage records that the ledger has not acknowledged.", now.journal.records),
            ("usage_bytes", "Bytes of these records.", now.journal.bytes),
            ("usage_on_disk", "1 while usage records are written to the disk.", int(now.journal.on_disk)),
        ):
            yield _gauge(f"lorapool_runtime_{name}", help_text, {"base": self._base}, value)
        for name, help_text, value in (
            ("engine_steps", "Steps of the engine.", now.steps),
            ("preemptions", "Sequences sent back to the queue for want of KV blocks.", now.preemptions),
            ("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.", now.prefix_queried_tokens),
            (
                "prefix_cache_hit_tokens",
                "Prompt tokens found in the prefix cache, which were not computed again.",
                now.prefix_hit_tokens,
            ),
            ("usage_write_errors", "Writes of usage records that failed.", now.journal.write_errors),
            ("usage_damaged_records", "Usage records that could not be read at the start.", now.journal.damaged_lines),
            (
                "usage_folded_requests",
                "Requests whose usage records were summed up, since too many were kept.",
                now.journal.folded_requests,
            ),
            (
                "usage_dropped_records",
                "Usage records that were given up, since too many were kept: the ledger misses them.",
                now.journal.dropped_records,
            ),
        ):
            counter = CounterMetricFamily(f"lorapool_runtime_{name}", help_text, labels=["base"])
            counter.add_metric([self._base], value)
            yield counter
        if (program := now.decode_program) is not None:
            labels = {
                "base": self._base, "state": "active" if program.active else "fallback", "reason": program.reason,
            }  # fmt: skip
            yield _gauge(
                "lorapool_runtime_decode_program",
                "How decode steps run: as one native call on a CPU or one captured graph on a GPU (active), or by the "
                "model's own code (fallback).",
                labels,
                1,
            )

    def _per_adapter(self) -> Iterator[Metric]:
        labelled, others, now_s = self._usage.labelled(), self._usage.others(), self._clock.now_s()
        groups = [(usage.display, [usage]) for usage in labelled]
        if others:
            groups.append((OTHER, others))
        requests = CounterMetricFamily(
            "lorapool_runtime_adapter_requests", "Requests that ended.", labels=["base", "adapter", "outcome"]
        )
        resident = GaugeMetricFamily(
            "lorapool_runtime_adapter_resident", "1 while it is on the device.", labels=["base", "adapter"]
        )
        counters: dict[str, tuple[str, Callable[[AdapterUsage], float]]] = {
            "prompt_tokens": ("Prompt tokens.", lambda a: a.prompt_tokens),
            "completion_tokens": ("Completion tokens.", lambda a: a.completion_tokens),
            "cached_tokens": ("Prompt tokens that were not computed again.", lambda a: a.cached_tokens),
            "loads": ("Loads onto the device.", lambda a: a.loads),
            "load_seconds": ("Time spent loading.", lambda a: a.load_seconds),
            "residency_seconds": ("Time on the device.", lambda a: a.residency_seconds(now_s)),
        }
        families = {
            name: CounterMetricFamily(f"lorapool_runtime_adapter_{name}", text, labels=["base", "adapter"])
            for name, (text, _value) in counters.items()
        }
        for label, usages in _merged(groups):
            where = [self._base, label]
            requests.add_metric([*where, Outcome.COMPLETED.value], sum(a.completed for a in usages))
            requests.add_metric([*where, Outcome.FAILED.value], sum(a.failed for a in usages))
            requests.add_metric([*where, Outcome.CANCELLED.value], sum(a.cancelled for a in usages))
            resident.add_metric(where, sum(bool(a.resident_since_s) for a in usages))
            for name, (_text, value) in counters.items():
                families[name].add_metric(where, sum(value(a) for a in usages))
        yield requests
        yield resident
        yield from families.values()


class _InferenceGatewayCollector:
    """Collects the same state under the names of the inference gateways' protocol."""

    def __init__(self, base: str, clock: Clock, gauges: Callable[[], Gauges]) -> None:
        self._base = base
        self._clock = clock
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        now = self._gauges()
        model = {"model_name": self._base}
        yield _gauge("vllm:num_requests_running", "Sequences the engine computes.", model, now.running)
        yield _gauge("vllm:num_requests_waiting", "Sequences that wait.", model, now.waiting)
        yield _gauge("vllm:kv_cache_usage_perc", "Used fraction of the KV cache, 0 to 1.", model, now.kv_usage)
        labels = {
            "max_lora": str(now.slots_total),
            "running_lora_adapters": ",".join(now.running_adapters),
            "waiting_lora_adapters": ",".join(now.waiting_adapters),
        }
        yield _gauge("vllm:lora_requests_info", "Adapters with requests; the value is the time.", labels,
                     self._clock.unix_s())  # fmt: skip


def _merged(groups: Iterable[tuple[str, list[AdapterUsage]]]) -> Iterable[tuple[str, list[AdapterUsage]]]:
    """One group per label: an object that was deleted and created again has two uids and one name for a while."""
    merged: dict[str, list[AdapterUsage]] = {}
    for label, usages in groups:
        merged.setdefault(label, []).extend(usages)
    return merged.items()


def _gauge(name: str, help_text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
