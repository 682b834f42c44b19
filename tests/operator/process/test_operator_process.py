"""The program as a cluster starts it: settings from the environment, probes, metrics, a clean exit."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import aiohttp
import pytest
from fakes_operator import FakeInspector, ScriptedRuntime
from operator_world import MASTER_TOKEN, Api, condition, operator_program, running_operator, token_of, until
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.apiserver


async def scrape(port: int, path: str = "/metrics") -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def test_the_program_starts_leads_inspects_and_exits_after_a_signal(api: Api, tmp_path: Path) -> None:
    async with operator_program(api, tmp_path) as program:
        await api.base()
        await api.adapter("a")

        async def ready() -> tuple[str, str]:
            return condition(await api.get("loraadapters", "a"), "Ready")

        await until(ready, ("False", "SourceUnavailable"), within_s=60.0)  # nothing listens at that hub
    log = program.log
    assert program.code == 0, log
    assert "Traceback" not in log
    assert "Forbidden" not in log
    assert re.search(r"(?<![\d.:])403(?![\d.])", log) is None  # a number of its own, not the digits of a time
    assert MASTER_TOKEN not in log
    assert '"message": "leading"' in log


async def test_the_program_exits_with_a_message_for_invalid_settings(tmp_path: Path) -> None:
    environment = {**os.environ, "LORAPOOL_OPERATOR_RESYNC": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "lorapool_operator", env=environment, cwd=tmp_path, stderr=asyncio.subprocess.PIPE
    )
    assert program.stderr is not None
    message = (await program.stderr.read()).decode()
    assert await program.wait() == 2
    assert "unknown setting LORAPOOL_OPERATOR_RESYNC" in message
    assert "Traceback" not in message


async def test_probes_and_metrics_show_the_state_and_series_disappear_with_the_object(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()) as process:
        base = await api.base()
        await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)

            async def shown() -> bool:
                _, text = await scrape(process.metrics_port)
                return f'lorapool_operator_adapter_ready{{adapter="{api.namespace}/a"}} 1.0' in text

            await until(shown)
            assert (await scrape(process.metrics_port, "/healthz"))[0] == 200
            assert (await scrape(process.metrics_port, "/readyz"))[0] == 200
            _, text = await scrape(process.metrics_port)
            families = {family.name: family for family in text_string_to_metric_families(text)}
            ours = [name for name in families if name.startswith("lorapool_operator_")]
            for name in (
                "lorapool_operator_reconciles",
                "lorapool_operator_reconcile_duration_seconds",
                "lorapool_operator_queue_depth",
                "lorapool_operator_queue_oldest_age_seconds",
                "lorapool_operator_adapters",
                "lorapool_operator_inspections_waiting",
                "lorapool_operator_base_condition",
                "lorapool_operator_runtime_polls",
            ):
                assert name in ours
            assert all(re.fullmatch(r"[a-z_]+", name) and families[name].documentation for name in ours)
            await api.delete("loraadapters", "a")

            async def vanished() -> bool:
                _, text = await scrape(process.metrics_port)
                return f'adapter="{api.namespace}/a"' not in text and "lorapool_operator_adapters{" not in text

            await until(vanished)
