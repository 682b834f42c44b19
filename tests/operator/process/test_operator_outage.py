"""The API server stops and starts again, and watches lose events. The operator recovers from both by itself."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from fakes_operator import FakeInspector, ScriptedRuntime, digest
from operator_world import Api, condition, running_operator, token_of, until

from lorapool_api.common import AdapterKey

pytestmark = pytest.mark.apiserver


async def ready(api: Api, name: str) -> tuple[str, str]:
    return condition(await api.get("loraadapters", name), "Ready")


async def test_after_an_outage_of_the_api_server_the_operator_catches_up(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector()
    async with running_operator(api, tmp_path, inspector) as process:
        base = await api.base()
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: ready(api, "a"), ("True", "Parked"))
            await asyncio.to_thread(api.server.interrupt)
            try:
                key = AdapterKey(adapter["metadata"]["uid"], digest("hf://org/a"))
                runtime.have(key, f"{api.namespace}/a")  # is loaded while no status can be written
                polls = process.control.runtimes.polls
                await asyncio.sleep(3.0)
                assert process.control.runtimes.polls > polls  # runtimes are still polled
            finally:
                await asyncio.to_thread(api.server.resume)

            async def answers() -> bool:
                try:
                    return bool(await api.get("basemodels", "tiny"))
                except Exception:  # not up yet
                    return False

            await until(answers, within_s=60.0)
            began = time.monotonic()

            async def loaded() -> tuple[str, str]:
                return condition(await api.get("loraadapters", "a"), "Loaded")

            await until(loaded, ("True", "Loaded"))
            await api.adapter("b")
            await until(lambda: ready(api, "b"), ("True", "Parked"))
            assert time.monotonic() - began < 40.0


async def test_the_resync_repairs_events_that_a_watch_lost(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=1.0) as process:
        await api.base()
        await api.adapter("kept")
        await until(lambda: ready(api, "kept"), ("True", "Parked"))
        adapters = process.control.cache.adapters
        # as if the watch had delivered neither the deletion nor the creation
        ghost = adapters.get(api.namespace, "kept")
        assert ghost is not None
        await api.adapter("missed")
        await until(lambda: ready(api, "missed"), ("True", "Parked"))
        await api.delete("loraadapters", "kept")

        async def gone() -> bool:
            return adapters.get(api.namespace, "kept") is None

        await until(gone)
        process.control.cache.put_adapter(ghost)
        process.control.cache.drop_adapter(api.namespace, "missed")
        await until(gone)

        async def known() -> bool:
            return adapters.get(api.namespace, "missed") is not None

        await until(known)
