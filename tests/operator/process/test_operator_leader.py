"""Leader election: of two operators one acts and the other takes over; a leader without the Lease writes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fakes_operator import FakeInspector
from operator_world import TLS_GOODBYE_S, Api, condition, operator_settings, running_operator, until

from lorapool_artifacts.settings import SourceSettings
from lorapool_operator.effects.fence import FencedError
from lorapool_operator.process import Process

pytestmark = pytest.mark.apiserver

LEASE: dict[str, Any] = {
    "leader_election": True,
    "lease_duration_s": 4,
    "lease_renew_deadline_s": 3.0,
    "lease_retry_s": 1.0,
}
LONG_LEASE: dict[str, Any] = LEASE | {"lease_duration_s": 120, "lease_renew_deadline_s": 60.0}
"""Does not expire within a test: a successor takes over only after a release."""


async def test_of_two_operators_one_acts_and_the_other_takes_over(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector()
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()

    async def state(name: str) -> tuple[str, str]:
        return condition(await api.get("loraadapters", name), "Ready")

    async with (
        running_operator(api, two, inspector, **LONG_LEASE) as standby_or_leader,
        running_operator(api, one, inspector, **LONG_LEASE) as other,
    ):
        both = (standby_or_leader, other)

        async def leaders() -> list[bool]:
            return [process.synced for process in both]

        await until(lambda: _any(leaders))
        await api.base()
        await api.adapter("a")
        await until(lambda: state("a"), ("True", "Parked"))
        assert sorted(await leaders()) == [False, True]
        assert inspector.asked == ["hf://org/a"]
        holder = (await api.get("leases", "lorapool-operator"))["spec"]["holderIdentity"]
        leader = next(process for process in both if process.synced)
        assert holder == leader.settings.identity
        assert [process.cluster.writes.get("status", 0) > 0 for process in both] == await leaders()
        leader.stop()
        survivor = next(process for process in both if process is not leader)

        async def took_over() -> bool:
            return survivor.synced

        await until(took_over)  # it was released: it would expire only in two minutes
        await api.adapter("b")
        await until(lambda: state("b"), ("True", "Parked"))


async def _any(leaders: Any) -> bool:
    return any(await leaders())


async def test_a_leader_whose_lease_was_taken_writes_nothing_and_ends(api: Api, tmp_path: Path) -> None:
    settings = operator_settings(api, tmp_path, **LEASE)
    process = Process(settings, sources=SourceSettings(), inspector=FakeInspector())
    running = asyncio.create_task(process.run())

    async def leads() -> bool:
        return process.synced

    async def fenced() -> bool:
        return not process._leadership.may_write()

    try:
        await until(leads)
        taken = {
            "holderIdentity": "thief",
            "leaseDurationSeconds": 3600,
            "renewTime": "2099-01-01T00:00:00.000000Z",
        }
        await api.patch("leases", "lorapool-operator", {"spec": taken})
        await until(fenced, every_s=0.01)
        base = await api.base()
        with pytest.raises(FencedError):
            await process.cluster.delete("Pod", api.namespace, "any", uid=base["metadata"]["uid"])
        await asyncio.wait_for(asyncio.shield(running), 30)
        assert not process.stop_requested  # so the program exits with 1, and the kubelet starts it again
        assert "status" not in await api.get("basemodels", "tiny")
        assert (await api.get("leases", "lorapool-operator"))["spec"]["holderIdentity"] == "thief"
    finally:
        process.stop()
        await asyncio.wait_for(running, 20)
        await asyncio.sleep(TLS_GOODBYE_S)
