"""Many adapters at once: each is inspected with one status write; the time is printed for the docs."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from fakes_operator import FakeInspector, ScriptedRuntime, digest
from operator_world import Api, condition, running_operator, token_of, until

from lorapool_api.common import AdapterKey
from lorapool_operator.process import Process

pytestmark = pytest.mark.apiserver

ADAPTERS = int(os.environ.get("LORAPOOL_TEST_ADAPTERS", "200"))
"""More adapters show how the time grows."""


async def test_many_adapters_at_once_cost_one_status_write_each(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspector = FakeInspector(delay_s=0.02)
    settings = {"resync_s": 60.0, "counts_interval_s": 1.0, "source_check_s": 1e9}  # no later look at a source is due
    async with running_operator(api, tmp_path, inspector, **settings) as process:
        await api.base()
        before = process.cluster.writes.get("status", 0)
        began = time.monotonic()
        for first in range(0, ADAPTERS, 100):
            await asyncio.gather(*(api.adapter(f"a-{number}") for number in range(first, min(first + 100, ADAPTERS))))
        created_s = time.monotonic() - began

        async def all_ready() -> bool:
            items = await api.items("loraadapters")
            return sum(condition(item, "Ready") == ("True", "Parked") for item in items) == ADAPTERS

        await until(all_ready, within_s=30.0 + ADAPTERS * 0.1, every_s=0.2 + ADAPTERS / 2000)
        took_s = time.monotonic() - began
        await asyncio.sleep(3.0)  # watch events of the operator's own writes must not cause more
        writes, counted_s = process.cluster.writes["status"] - before, time.monotonic() - began
        assert inspector.most_running <= 8
        assert sorted(inspector.asked) == sorted(f"hf://org/a-{number}" for number in range(ADAPTERS))

        async def counted() -> int:
            return int((await api.get("basemodels", "tiny"))["status"]["adapters"]["ready"])

        await until(counted, ADAPTERS)
        per_object = _status_writes(api)
        assert {name: count for name, count in per_object.items() if name.startswith("a-") and count != 1} == {}
        assert writes - ADAPTERS <= 1 + counted_s / 1.0 + 3  # the base's own, at most one a second, and its first ones
    with capsys.disabled():
        print(f"\n{ADAPTERS} adapters: created in {created_s:.1f} s, all ready after {took_s:.1f} s, {writes} writes")


async def test_adapters_that_rotate_over_few_slots_cost_a_bounded_number_of_status_writes(
    api: Api, tmp_path: Path
) -> None:
    """Sixteen adapters take turns in four slots; in an hour-long interval each may be written four times in a row."""
    names = [f"a-{number}" for number in range(16)]
    settings = {"load_status_interval_s": 3600.0, "usage_interval_s": 3600.0, "poll_pause_s": 0.01, "resync_s": 600.0}
    async with running_operator(api, tmp_path, FakeInspector(), **settings) as process:
        base = await api.base()
        keys = [AdapterKey((await api.adapter(name))["metadata"]["uid"], digest(f"hf://org/{name}")) for name in names]
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: condition_of(api, "basemodels", "tiny", "Ready"), ("True", "Ready"))
            for name in names:
                await until(lambda name=name: condition_of(api, "loraadapters", name, "Ready"), ("True", "Parked"))
            for turn in range(24):
                seen = process.control.runtimes.polls
                runtime.adapters.clear()
                for number in range(4 * turn % 16, 4 * turn % 16 + 4):
                    runtime.have(keys[number], f"{api.namespace}/{names[number]}")
                await until(lambda seen=seen: polled(process, seen + 2), every_s=0.01)
            runtime.adapters.clear()
            runtime.change()

            async def none_loaded() -> bool:
                return all(not item["status"].get("loadedReplicas") for item in await api.items("loraadapters"))

            await until(none_loaded)
    writes = {name: count for name, count in _status_writes(api).items() if name in names}
    assert writes.keys() == set(names)
    assert max(writes.values()) <= 1 + 4 + 1  # checked, a burst of four, and an unload
    assert max(writes.values()) > 1  # the turns were seen


async def condition_of(api: Api, plural: str, name: str, kind: str) -> tuple[str, str]:
    return condition(await api.get(plural, name), kind)


async def polled(process: Process, polls: int) -> bool:
    return process.control.runtimes.polls >= polls


def _status_writes(api: Api) -> Counter[str]:
    """Counts the status patches of this namespace by object, from the API server's audit log."""
    found: Counter[str] = Counter()
    for line in api.server.audit_log.read_text().splitlines():
        event = json.loads(line)
        ref = event.get("objectRef") or {}
        done = event.get("stage") == "ResponseComplete" and event.get("verb") == "patch"
        if done and ref.get("namespace") == api.namespace and ref.get("subresource") == "status":
            found[ref["name"]] += 1
    return found
