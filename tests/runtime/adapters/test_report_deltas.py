"""A reader of the runtime's state gets what changed since its last snapshot, and the sum of it is the whole state."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from fakes_runtime import (
    FakeClock,
    FakeEngine,
    Served,
    acquire,
    descriptor,
    digest_of_name,
    key_of,
    serving,
    source_error,
    until,
)

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.openai import NoFreeSlotError, RuntimeNotRegisteredError, UnprocessableError
from lorapool_api.protocol import AdapterReport, AdapterState, RuntimeSnapshot
from lorapool_runtime.adapters.deltas import ReportChanges
from lorapool_runtime.events import Changes

Known = dict[tuple[str, str], AdapterReport]


@pytest.fixture
async def served(byte_tokenizer: Path) -> AsyncIterator[Served]:
    async with serving(byte_tokenizer) as running:
        yield running


def by_key(snapshot: RuntimeSnapshot) -> Known:
    return {(item.uid, item.digest): item for item in snapshot.adapters}


def merged(known: Known, snapshot: RuntimeSnapshot) -> Known:
    if snapshot.full:
        return by_key(snapshot)
    gone = {(item.uid, item.digest) for item in snapshot.removed}
    return {key: item for key, item in known.items() if key not in gone} | by_key(snapshot)


async def poll(
    session: aiohttp.ClientSession, after: int, boot: str, *, wait: str = "0"
) -> tuple[RuntimeSnapshot, int]:
    """The answer and its size in bytes."""
    async with session.get("/v1/runtime", params={"after": str(after), "boot": boot, "wait": wait}) as response:
        body = await response.read()
    return RuntimeSnapshot.model_validate_json(body), len(body)


async def test_one_change_among_a_thousand_adapters_costs_one_report(served: Served) -> None:
    manager = served.runtime.adapters
    for number in range(1000):
        await manager.register(key_of(f"a{number}"), descriptor(f"a{number}"))
    async with aiohttp.ClientSession(served.url) as session:
        first, whole = await poll(session, 0, "")
        assert (first.full, len(first.adapters)) == (True, 1000)
        (await acquire(manager, key_of("a7"))).release()
        second, part = await poll(session, first.seq, first.boot_id)
        assert (second.full, [item.display for item in second.adapters]) == (False, ["team/a7"])
        assert part < whole / 100
        await until(lambda: served.runtime.changes.seq > second.seq)  # the lease's end is announced a moment later
        quiet, _ = await poll(session, served.runtime.changes.seq, first.boot_id)
        assert [item.display for item in quiet.adapters] == ["team/a7"]  # it is on the device: residency goes on


async def test_a_reader_of_another_process_gets_everything_at_once(served: Served) -> None:
    await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
    async with aiohttp.ClientSession(served.url) as session, asyncio.timeout(5):
        seq = served.runtime.changes.seq
        for after, boot in ((seq, "another"), (0, served.runtime.boot_id), (seq + 99, served.runtime.boot_id)):
            answer, _ = await poll(session, after, boot, wait="20")
            assert (answer.full, len(answer.adapters)) == (True, 1)
        async with session.get("/v1/runtime", params={"after": str(seq)}) as response:  # a reader of an older version
            assert RuntimeSnapshot.model_validate(await response.json()).full


async def test_a_removed_adapter_is_named(served: Served) -> None:
    manager = served.runtime.adapters
    await manager.register(key_of("poet"), descriptor("poet"))
    before = served.runtime.changes.seq
    await manager.delete(key_of("poet"))
    snapshot = served.runtime.snapshot(before)
    assert (snapshot.full, snapshot.adapters) == (False, [])
    assert [(item.uid, item.digest) for item in snapshot.removed] == [tuple(key_of("poet"))]


async def test_a_refused_request_changes_the_report_of_its_adapter(served: Served) -> None:
    served.store.errors["s3://bucket/poet"] = [source_error(FailureReason.WRONG_BASE)]
    manager = served.runtime.adapters
    await manager.register(key_of("poet"), descriptor("poet"))
    with pytest.raises(UnprocessableError):
        await acquire(manager, key_of("poet"))
    before = served.runtime.changes.seq
    with pytest.raises(UnprocessableError):
        await acquire(manager, key_of("poet"))
    (item,) = served.runtime.snapshot(before).adapters
    assert item.usage.failed_requests == 2


def test_a_reader_who_missed_a_forgotten_removal_gets_everything() -> None:
    changes = Changes()
    reports = ReportChanges(changes, removals=2)
    keys = [AdapterKey(f"uid-{number}", digest_of_name("x")) for number in range(4)]
    for key in keys[:3]:
        reports.mark(key)
        changes.bump()
    seen = changes.seq
    for key in keys[:3]:
        reports.remove(key)
        changes.bump()
    assert reports.since(seen) is None
    delta = reports.since(seen + 1)
    assert delta is not None
    assert delta.removed == tuple(keys[1:3])
    reports.mark(keys[0])
    later = reports.since(seen + 1)
    assert later is not None
    assert (later.changed, later.removed) == ((keys[0],), tuple(keys[1:3]))


@pytest.mark.parametrize("seed", range(4))
async def test_the_sum_of_all_changes_is_the_whole_state(byte_tokenizer: Path, seed: int) -> None:
    clock, rng = FakeClock(), random.Random(seed)
    names = [f"a{number}" for number in range(8)]
    async with serving(byte_tokenizer, engine=FakeEngine(slots=2), clock=clock.clock(), slots=2) as served:
        manager, known, seq = served.runtime.adapters, Known(), 0
        for _ in range(150):
            name = rng.choice(names)
            match rng.randrange(5):
                case 0 | 1:
                    await manager.register(key_of(name), descriptor(name, idle_after_s=rng.choice([5.0, 500.0])))
                case 2:
                    with contextlib.suppress(NoFreeSlotError, RuntimeNotRegisteredError):
                        (await acquire(manager, key_of(name))).release()
                case 3:
                    with contextlib.suppress(RuntimeNotRegisteredError):
                        await manager.delete(key_of(name))
                case 4:
                    manager.sweep()
            clock.pass_s(rng.choice([0.0, 1.0, 30.0]))
            if rng.random() < 0.5:
                snapshot = served.runtime.snapshot(seq)
                known, seq = merged(known, snapshot), snapshot.seq
                assert known == by_key(served.runtime.snapshot())
        await until(lambda: all(item.state is not AdapterState.DRAINING for item in manager.reports()))
        assert merged(known, served.runtime.snapshot(seq)) == by_key(served.runtime.snapshot())
