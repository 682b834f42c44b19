"""Many adapters at once: each is inspected with one status write; the time is printed for the docs."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from fakes_operator import FakeInspector
from operator_world import Api, condition, running_operator, until

pytestmark = pytest.mark.apiserver

ADAPTERS = int(os.environ.get("LORAPOOL_TEST_ADAPTERS", "200"))
"""More adapters show how the time grows."""


async def test_many_adapters_at_once_cost_one_status_write_each(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspector = FakeInspector(delay_s=0.02)
    async with running_operator(api, tmp_path, inspector, resync_s=60.0, counts_interval_s=1.0) as process:
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
        writes = process.cluster.writes["status"] - before
        assert inspector.most_running <= 8
        assert sorted(inspector.asked) == sorted(f"hf://org/a-{number}" for number in range(ADAPTERS))

        async def counted() -> int:
            return int((await api.get("basemodels", "tiny"))["status"]["adapters"]["ready"])

        await until(counted, ADAPTERS)
        per_object = _status_writes(api)
        assert {name: count for name, count in per_object.items() if name.startswith("a-") and count != 1} == {}
        assert writes - ADAPTERS <= 1 + took_s / 1.0 + 3  # the base's own, at most one a second
    with capsys.disabled():
        print(f"\n{ADAPTERS} adapters: created in {created_s:.1f} s, all ready after {took_s:.1f} s, {writes} writes")


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
