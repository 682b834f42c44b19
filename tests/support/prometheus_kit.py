"""A real Prometheus with the chart's recording rules, and registries served for it to scrape."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import yaml
from aiohttp import web
from chart_kit import CHART, tool
from prometheus_client import CollectorRegistry

from lorapool_api.settings import ProcessSettings
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_operator.metrics import status_app


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


OPEN = MetricsAccess(ProcessSettings())


@asynccontextmanager
async def exported(registry: CollectorRegistry, port: int) -> AsyncIterator[None]:
    """Serves the metrics of a registry."""
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

    async def until(self, expression: str, wanted: float | None) -> None:
        """Waits for a value; None: for the end of the series."""
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
