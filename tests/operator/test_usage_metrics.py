"""The operator's usage metrics: complete by base and namespace, however many adapters have series of their own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fakes_operator import NOTHING_TO_MEASURE
from prometheus_client import CollectorRegistry

from lorapool_operator.metrics import StateCollector
from lorapool_operator.world.cluster_cache import AdapterObject, ClusterCache

NOTHING: Any = NOTHING_TO_MEASURE
REQUESTS = "lorapool_operator_adapter_requests_total"


def cache_with(*adapters: tuple[str, str, str, int]) -> ClusterCache:
    """Adapters as (namespace, name, base, requests); the later, the older."""
    cache = ClusterCache()
    for number, (namespace, name, base, requests) in enumerate(adapters):
        created = f"2026-01-01T00:00:{59 - number}Z"
        meta = {"namespace": namespace, "name": name, "uid": name, "resourceVersion": "1", "creationTimestamp": created}
        spec = {"baseModelRef": {"name": base, "namespace": "team-a"}, "source": {"uri": "hf://org/x"}}
        status = {"usage": {"requests": requests, "failedRequests": 1, "promptTokens": 10 * requests}}
        cache.put_adapter(AdapterObject.parse({"metadata": meta, "spec": spec, "status": status}))
    return cache


def scraped(cache: ClusterCache, tracked: int) -> dict[tuple[str, str, str], float]:
    """Requests by (base, adapter, outcome)."""
    registry = CollectorRegistry()
    registry.register(
        StateCollector(
            cache, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, leading=lambda: True, max_tracked_adapters=tracked
        )
    )
    return {
        (sample.labels["base"], sample.labels["adapter"], sample.labels["outcome"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == REQUESTS
    }


ADAPTERS = (
    ("team-a", "a", "tiny", 5),
    ("team-a", "b", "tiny", 7),
    ("team-b", "c", "tiny", 11),
    ("team-b", "d", "big", 13),
)


@pytest.mark.parametrize("tracked", [0, 1, 3, 4, 9])
def test_sums_by_base_and_by_namespace_do_not_depend_on_how_many_adapters_have_series(tracked: int) -> None:
    sums: Counter[str] = Counter()
    for (base, adapter, _), value in scraped(cache_with(*ADAPTERS), tracked).items():
        sums[base] += int(value)
        sums[adapter.partition("/")[0]] += int(value)
    assert sums == {"team-a/tiny": 23, "team-a/big": 13, "team-a": 12, "team-b": 24}


def test_the_oldest_adapters_have_series_of_their_own_and_the_others_share_one_by_namespace() -> None:
    found = scraped(cache_with(*ADAPTERS), 1)
    assert {adapter for _, adapter, _ in found} == {"team-b/d", "team-a/__other__", "team-b/__other__"}
    assert found["team-a/tiny", "team-a/__other__", "completed"] == 10
    assert found["team-a/tiny", "team-a/__other__", "failed"] == 2
