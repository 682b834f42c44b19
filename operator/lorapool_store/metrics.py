"""The store's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_METHODS = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class _Bytes(Collector):
    """Read for each scrape, so that the series of a namespace that is not used any more vanish."""

    def __init__(self) -> None:
        self.read: Callable[[], Mapping[str, int]] = dict

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "lorapool_store_bytes", "Bytes of the namespaces used in the last minute.", labels=("store_namespace",)
        )
        for namespace, size in sorted(self.read().items()):
            family.add_metric((namespace,), size)
        yield family


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._requests = Counter(
            "lorapool_store_requests_total",
            "Requests by method and HTTP status.",
            ("method", "code"),
            registry=self.registry,
        )
        self._expired = Counter(
            "lorapool_store_expired_total", "Objects deleted because they had expired.", registry=self.registry
        )
        self._bytes = _Bytes()
        self.registry.register(self._bytes)

    def follow(self, counted: Callable[[], Mapping[str, int]]) -> None:
        """Reads bytes by namespace from here."""
        self._bytes.read = counted

    def request(self, method: str, code: int) -> None:
        """Counts an answered request."""
        self._requests.labels(method if method in _METHODS else "other", str(code)).inc()

    def expired(self, count: int) -> None:
        """Counts deleted objects."""
        self._expired.inc(count)
