"""What a bill is split by: a real Prometheus with the chart's rules shows exactly what was counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from chart_kit import CHART, tool
from fakes_operator import NOTHING_TO_MEASURE

from lorapool_api.settings import ProcessSettings
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_operator.metrics import Metrics, StateCollector, status_app
from lorapool_operator.world.cluster_cache import AdapterObject, ClusterCache

NOTHING: Any = NOTHING_TO_MEASURE


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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


OPEN = MetricsAccess(ProcessSettings())


@asynccontextmanager
async def operator(adapters: Adapters, port: int) -> AsyncIterator[None]:
    registry = Metrics().registry
    registry.register(
        StateCollector(
            adapters.cache, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, leading=lambda: True, max_tracked_adapters=9
        )
    )
    runner = web.AppRunner(status_app(registry, OPEN, healthy=lambda: "", ready=lambda: ""), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield
    finally:
        await runner.cleanup()


class Prometheus:
    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def value(self, expression: str) -> float | None:
        try:
            async with self._session.get(f"{self._url}/api/v1/query", params={"query": expression}) as response:
                result = (await response.json())["data"]["result"]
        except (aiohttp.ClientError, KeyError):  # it is still starting
            return None
        return float(result[0]["value"][1]) if result else None

    async def until(self, expression: str, wanted: float) -> None:
        value = None
        try:
            async with asyncio.timeout(60):
                while (value := await self.value(expression)) != wanted:  # noqa: ASYNC110  another process
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{expression} is {value}, not {wanted}") from None


@asynccontextmanager
async def prometheus(folder: Path, targets: list[int]) -> AsyncIterator[Prometheus]:
    port = free_port()
    config = folder / "prometheus.yaml"
    scrape = {"job_name": "operator", "static_configs": [{"targets": [f"127.0.0.1:{target}" for target in targets]}]}
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "300ms", "scrape_timeout": "300ms", "evaluation_interval": "300ms"},
                "rule_files": [str(CHART / "rules" / "recording.yaml")],
                "scrape_configs": [scrape],
            }
        )
    )
    process = await asyncio.create_subprocess_exec(
        tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with aiohttp.ClientSession() as session:
            yield Prometheus(f"http://127.0.0.1:{port}", session)
    finally:
        process.terminate()
        await process.wait()


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
