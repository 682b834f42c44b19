"""What a bill is split by: a real Prometheus with the chart's rules shows exactly what was counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fakes_operator import NOTHING_TO_MEASURE
from prometheus_kit import exported, free_port, prometheus

from lorapool_operator.metrics import Metrics, StateCollector
from lorapool_operator.world.cluster_cache import AdapterObject, ClusterCache

NOTHING: Any = NOTHING_TO_MEASURE


class Adapters:
    """The objects whose usage an operator exports."""

    def __init__(self) -> None:
        self.cache = ClusterCache()
        self._version = 0

    def count(self, name: str, **usage: int) -> None:
        self._version += 1
        meta = {"namespace": "team", "name": name, "uid": name, "resourceVersion": str(self._version)}
        spec = {"baseModelRef": {"name": "tiny"}, "source": {"uri": f"hf://org/{name}"}}
        status = {"usage": usage} if usage else {}
        self.cache.put_adapter(AdapterObject.parse({"metadata": meta, "spec": spec, "status": status}))


@asynccontextmanager
async def operator(adapters: Adapters, port: int) -> AsyncIterator[None]:
    registry = Metrics().registry
    registry.register(
        StateCollector(
            adapters.cache, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, leading=lambda: True, max_tracked_adapters=9
        )
    )
    async with exported(registry, port):
        yield


async def test_prometheus_shows_all_that_was_counted_over_a_restart_of_the_operator(tmp_path: Path) -> None:
    adapters, ports = Adapters(), [free_port(), free_port()]
    total = 'sum(adapter:lorapool_tokens:total{type="completion"})'
    async with prometheus(tmp_path, ports) as metrics:
        async with operator(adapters, ports[0]):
            adapters.count("a")
            await metrics.until(total, 0)  # the series exists before anything is counted
            adapters.count("a", requests=4, completionTokens=40)
            await metrics.until(total, 40)
        adapters.count(
            "a", requests=6, failedRequests=1, completionTokens=100
        )  # is in the status, and no operator runs
        async with operator(adapters, ports[1]):
            await metrics.until(total, 100)
            adapters.count("b", requests=4, completionTokens=67)  # its series begins above 0
            await metrics.until('sum(adapter:lorapool_tokens:delta1h{type="completion"})', 167)
            await metrics.until("sum(adapter:lorapool_requests:delta1h)", 10)
            await metrics.until('sum(adapter:lorapool_requests:delta1h{outcome="failed"})', 1)
