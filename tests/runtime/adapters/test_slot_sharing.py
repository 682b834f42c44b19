"""More adapters are asked for than there are slots: each gets its turn and answers with its own weights."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import artifact_zoo as zoo
import pytest
from artifact_hub import Fault, Hub
from fakes_runtime import FakeClock, FakeEngine, Served, acquire, descriptor, key_of, serving, until

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import AdapterState, ResolveRequest, SourceRef, Tier
from lorapool_artifacts.cache import DiskCache
from lorapool_artifacts.settings import FetchLimits, SourceSettings
from lorapool_runtime.adapters.disk_store import DiskStore
from lorapool_runtime.adapters.entry import AdapterEntry
from lorapool_runtime.adapters.registry import AdapterRegistry
from lorapool_runtime.adapters.source_access import SourceAccess
from lorapool_runtime.clock import Clock


async def ask(session: aiohttp.ClientSession, name: str, tokens: int = 4) -> tuple[int, str]:
    """Status, and the text or the code of the error."""
    body = {"model": f"team/{name}", "prompt": "hi", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body) as response:
        answer = await response.json()
        return response.status, answer["choices"][0]["text"] if response.status == 200 else answer["error"]["code"]


@asynccontextmanager
async def crowded(
    folder: Path, *names: str, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[tuple[Served, aiohttp.ClientSession]]:
    """One slot and room for two sequences, unless `settings` says otherwise; each adapter says its own name."""
    settings = {"slots": 1, "max_batch": 2, **settings}
    engine = FakeEngine(
        reply=lambda tag, *_: tag, step_s=0.002, slots=settings["slots"], max_batch=settings["max_batch"]
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        serving(folder, engine=engine, clock=clock, **settings) as served,
        aiohttp.ClientSession(served.url, connector=connector) as session,
    ):
        for name in names:
            await served.runtime.adapters.register(key_of(name), descriptor(name))
        yield served, session


def state(served: Served, name: str) -> AdapterState:
    return next(item.state for item in served.runtime.adapters.reports() if item.display == f"team/{name}")


def tier(served: Served, name: str) -> Tier:
    return next(item.tier for item in served.runtime.adapters.reports() if item.display == f"team/{name}")


async def test_steady_requests_for_one_adapter_do_not_refuse_another(byte_tokenizer: Path) -> None:
    """With one slot and requests of `a` that always overlap, every request of `b` got 409 before there was a queue."""
    async with crowded(byte_tokenizer, "a", "b") as (served, session):
        done = asyncio.Event()

        async def steady() -> set[tuple[int, str]]:
            seen = set()
            while not done.is_set():
                seen.add(await ask(session, "a", 20))
            return seen

        load = [asyncio.create_task(steady()) for _ in range(3)]
        await until(lambda: served.engine.tokens_made > 20)
        assert [await ask(session, "b") for _ in range(5)] == [(200, "bbbb")] * 5
        done.set()
        assert {answer for seen in await asyncio.gather(*load) for answer in seen} == {(200, "a" * 20)}


async def test_requests_that_wait_for_their_turn_do_not_hold_the_slot(byte_tokenizer: Path) -> None:
    async with crowded(byte_tokenizer, "a", "b") as (served, session):
        ends: list[str] = []

        async def one(name: str) -> tuple[int, str]:
            answer = await ask(session, name, 10)
            ends.append(name)
            return answer

        flood = [asyncio.create_task(one("a")) for _ in range(20)]
        await until(lambda: served.engine.tokens_made > 5)
        assert await one("b") == (200, "b" * 10)
        before = ends.index("b")
        assert before <= 6  # those that ran, and a few that the engine had been given
        assert {await request for request in flood} == {(200, "a" * 10)}
        assert served.engine.loads == Counter(a=2, b=1)


async def test_an_adapter_serves_on_when_the_one_that_waited_for_its_slot_gives_up(
    byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with crowded(byte_tokenizer, "a", "b", slot_wait_s=0.1) as (served, _):
        manager = served.runtime.adapters
        lease = await acquire(manager, key_of("a"))  # it never ends in this time
        drained: list[AdapterKey] = []
        monkeypatch.setattr(AdapterRegistry, "begin_drain", recording(AdapterRegistry.begin_drain, drained))
        waiting = asyncio.create_task(acquire(manager, key_of("b")))
        await asyncio.wait([waiting])
        assert getattr(waiting.exception(), "code", None) == "no_slot"
        assert drained == [key_of("a")]
        (await acquire(manager, key_of("a"))).release()
        assert state(served, "a") is AdapterState.LOADED
        lease.release()
        assert served.engine.unloads == 0


def recording(begin_drain: Callable[..., None], drained: list[AdapterKey]) -> Callable[..., None]:
    """The same method, which also notes the adapters that have to make room."""

    def begin(registry: AdapterRegistry, entry: AdapterEntry) -> None:
        drained.append(entry.key)
        begin_drain(registry, entry)

    return begin


async def test_an_adapter_is_not_displaced_before_its_minimum_residency(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with crowded(byte_tokenizer, "a", "b", clock=clock.clock(), min_residency_s=100.0, slot_wait_s=1000.0) as (
        served,
        session,
    ):
        await ask(session, "a")
        waiting = asyncio.create_task(ask(session, "b"))
        await until(lambda: tier(served, "b") is Tier.HOST)  # it was read, and waits for the slot
        clock.pass_s(99.0)
        served.runtime.adapters.sweep()
        assert (state(served, "a"), served.engine.unloads) == (AdapterState.LOADED, 0)
        clock.pass_s(2.0)
        served.runtime.adapters.sweep()
        assert await waiting == (200, "bbbb")
        assert served.engine.unloads == 1


async def test_requests_go_on_when_the_client_that_their_adapter_made_room_for_leaves(byte_tokenizer: Path) -> None:
    async with crowded(byte_tokenizer, "a", "b") as (served, session):
        manager = served.runtime.adapters
        lease = await acquire(manager, key_of("a"))
        leaver = asyncio.create_task(ask(session, "b"))
        await until(lambda: state(served, "a") is AdapterState.DRAINING)
        behind = asyncio.create_task(acquire(manager, key_of("a")))
        await until(lambda: manager.waiting == 2)
        leaver.cancel()
        await until(lambda: manager.waiting == 1)
        manager.sweep()
        (await behind).release()
        lease.release()
        await until(lambda: served.runtime.snapshot().in_flight == 0)


async def test_sixteen_hot_adapters_on_four_slots_all_get_half_of_their_share(byte_tokenizer: Path) -> None:
    names = [f"n{number}" for number in range(16)]
    served_requests: Counter[str] = Counter()
    async with crowded(byte_tokenizer, *names, slots=4, max_batch=8, min_residency_s=0.02) as (_, session):

        async def hot(name: str) -> None:
            while served_requests.total() < 480:
                assert (await ask(session, name, 5))[0] == 200
                served_requests[name] += 1

        await asyncio.gather(*(hot(name) for name in names for _ in range(3)))
    assert min(served_requests[name] for name in names) >= 15


async def test_a_thousand_requests_for_one_cold_adapter_are_one_fetch_and_one_load(
    byte_tokenizer: Path, tmp_path: Path
) -> None:
    with Hub() as hub:
        hub.repos["acme/base"], hub.repos["acme/poet"] = zoo.base_files(), zoo.adapter_files()
        hub.faults = [Fault("resolve/", delay_s=0.2)]
        sources = SourceSettings(hf_endpoint=hub.url)
        cache = DiskCache(tmp_path, high_bytes=2**24, low_bytes=2**23)
        cache.start()
        store = DiskStore(cache, zoo.base_facts(), SourceAccess(sources), max_rank=16, fetch_limits=FetchLimits())
        source = SourceRef(uri="hf://acme/poet")
        digest = (await store.resolve(ResolveRequest(source=source))).digest
        assert digest is not None
        sent, key = hub.bodies_sent_of("adapter_model.safetensors"), AdapterKey("uid-poet", digest)
        bounds = {"max_load_waiting": 2000, "max_waiting": 2000}
        async with (
            serving(byte_tokenizer, store=store, **bounds) as served,
            aiohttp.ClientSession(served.url, connector=aiohttp.TCPConnector(limit=0)) as session,
        ):
            await served.runtime.adapters.register(key, descriptor("poet", source=source))
            answers = await asyncio.gather(*(ask(session, "poet") for _ in range(1000)))
        assert {status for status, _ in answers} == {200}
        assert hub.bodies_sent_of("adapter_model.safetensors") - sent == 1
        assert (served.engine.reads.total(), served.engine.loads.total()) == (1, 1)
