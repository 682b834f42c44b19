"""An adapter's life on one replica: registered, loaded on demand, shared, unloaded when idle, failed, deleted."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import (
    FakeClock,
    FakeEngine,
    FakeStore,
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
from lorapool_api.openai import (
    NoFreeSlotError,
    RuntimeNotRegisteredError,
    TooManyRequestsError,
    UnavailableError,
    UnprocessableError,
)
from lorapool_api.protocol import AdapterState, EventType, ResolveAnswer, RuntimeSnapshot, Tier
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.adapters.manager import AdapterManager
from lorapool_runtime.events import COALESCE_S

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def served(byte_tokenizer: Path) -> AsyncIterator[Served]:
    async with serving(byte_tokenizer) as running:
        yield running


async def ask(url: str, key: AdapterKey, session: aiohttp.ClientSession, **body: Any) -> tuple[int, Any, Any]:
    """(status, body, headers) of one chat."""
    request = {"model": "whatever", "messages": HI, **body}
    headers = {"x-lorapool-adapter": str(key)}
    async with session.post(f"{url}/v1/chat/completions", json=request, headers=headers) as response:
        return response.status, await response.json(), response.headers


def said(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def report(manager: AdapterManager, key: AdapterKey) -> Any:
    return next(item for item in manager.reports() if (item.uid, item.digest) == tuple(key))


async def test_fifty_requests_on_one_cold_adapter_share_one_load(byte_tokenizer: Path) -> None:
    store = FakeStore(delay_s=0.5)  # the last of fifty comes tens of milliseconds after the first
    async with serving(byte_tokenizer, store=store) as served, aiohttp.ClientSession() as session:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        answers = await asyncio.gather(*(ask(served.url, key_of("poet"), session) for _ in range(50)))
    assert {(status, said(body)) for status, body, _ in answers} == {(200, "I am poet.")}
    assert {headers["x-lorapool-adapter"] for *_, headers in answers} == {f"team/poet@{key_of('poet').digest}"}
    assert all(int(headers["x-lorapool-cold-start-ms"]) >= 100 for *_, headers in answers)
    assert (store.fetches.total(), served.engine.reads.total(), served.engine.loads["poet"]) == (1, 1, 1)


async def test_a_warm_answer_carries_no_cold_start_header(served: Served) -> None:
    async with aiohttp.ClientSession() as session:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        await ask(served.url, key_of("poet"), session)
        _, _, headers = await ask(served.url, key_of("poet"), session)
    assert "x-lorapool-cold-start-ms" not in headers


async def test_every_request_gets_its_own_adapter_while_slots_change_hands(byte_tokenizer: Path) -> None:
    engine, rng = FakeEngine(slots=3, load_s=0.002), random.Random(7)
    names = [f"a{number}" for number in range(9)]
    async with serving(byte_tokenizer, engine=engine, slots=3) as served, aiohttp.ClientSession() as session:
        for name in names:
            await served.runtime.adapters.register(key_of(name), descriptor(name))

        async def one() -> tuple[int, str, str]:
            name = rng.choice(names)
            await asyncio.sleep(rng.random() * 0.3)
            status, body, _ = await ask(served.url, key_of(name), session)
            return status, name, said(body) if status == 200 else body["error"]["code"]

        results = await asyncio.gather(*(one() for _ in range(150)))
        for name in names:  # one at a time, each must get a slot
            status, body, _ = await ask(served.url, key_of(name), session)
            assert (status, said(body)) == (200, f"I am {name}.")
    assert {status for status, *_ in results} == {200}
    assert all(text == f"I am {name}." for _, name, text in results)
    assert served.engine.unloads > 0


async def test_the_least_recently_used_leaves_and_never_one_in_use_or_pinned(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock(), slots=3, slot_wait_s=0.05) as served:
        manager = served.runtime.adapters
        for name in ("old", "busy", "pinned", "new", "newer"):
            await manager.register(key_of(name), descriptor(name))
        await manager.register(key_of("pinned"), descriptor("pinned", pinned=True))
        await until(lambda: report(manager, key_of("pinned")).state is AdapterState.LOADED)
        busy = await acquire(manager, key_of("busy"))
        clock.pass_s(10)
        (await acquire(manager, key_of("old"))).release()
        clock.pass_s(10)
        lease = await acquire(manager, key_of("new"))  # `busy` was used earlier, but is in use
        loaded = {item.display for item in manager.reports() if item.state is AdapterState.LOADED}
        assert loaded == {"team/busy", "team/pinned", "team/new"}
        with pytest.raises(NoFreeSlotError) as caught:
            await acquire(manager, key_of("newer"))
        assert caught.value.code == "no_slot"
        assert report(manager, key_of("newer")).failure is None  # its own state is untouched
        lease.release()
        busy.release()
        (await acquire(manager, key_of("newer"))).release()


async def test_an_idle_adapter_is_unloaded_and_leaves_host_memory_later(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock(), host_idle_s=100.0) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet", idle_after_s=60.0))
        lease = await acquire(manager, key_of("poet"))
        clock.pass_s(1000)
        manager.sweep()
        assert report(manager, key_of("poet")).state is AdapterState.LOADED  # in use, however long
        lease.release()
        clock.pass_s(59.9)
        manager.sweep()
        assert report(manager, key_of("poet")).tier is Tier.DEVICE
        clock.pass_s(0.2)
        manager.sweep()
        await until(lambda: report(manager, key_of("poet")).state is AdapterState.REGISTERED)
        unloaded = report(manager, key_of("poet"))
        assert (unloaded.tier, unloaded.device_bytes, unloaded.host_bytes) == (Tier.HOST, 0, 1000)
        assert unloaded.usage.residency_seconds == pytest.approx(1060.1)
        clock.pass_s(101)
        manager.sweep()
        assert report(manager, key_of("poet")).tier is Tier.DISK
        assert manager.host_bytes == 0
        kinds = [(event.type, event.seconds) for event in served.runtime.events.after(0).events]
        assert kinds[0][0] is EventType.LOADED
        assert kinds[1] == (EventType.UNLOADED, pytest.approx(1060.1))


async def test_an_unloaded_adapter_comes_back_from_host_memory_without_its_source(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock()) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet", idle_after_s=0.0))
        (await acquire(manager, key_of("poet"))).release()
        manager.sweep()
        (await acquire(manager, key_of("poet"))).release()
    assert served.store.fetches.total() == 1
    assert served.engine.loads["poet"] == 2


async def test_an_engine_that_keeps_no_copy_in_host_memory_reads_the_files_again(byte_tokenizer: Path) -> None:
    engine = FakeEngine(host_tier=False, load_s=0.2)
    async with serving(byte_tokenizer, engine=engine, clock=FakeClock().clock()) as served:
        manager, key = served.runtime.adapters, key_of("poet")
        await manager.register(key, descriptor("poet", idle_after_s=0.0))
        for round_number in (1, 2):
            waiting = asyncio.create_task(acquire(manager, key))
            await until(lambda now=round_number: engine.reads.total() == now)
            assert served.store.pins[key.digest]  # the engine reads the folder until the load has ended
            (await waiting).release()
            assert not served.store.pins[key.digest]
            manager.sweep()
            await until(lambda: report(manager, key).state is AdapterState.REGISTERED)
            unloaded = report(manager, key)
            assert (unloaded.tier, unloaded.host_bytes, manager.host_bytes) == (Tier.DISK, 0, 0)
    assert served.engine.loads["poet"] == 2


async def test_a_pinned_adapter_loads_without_a_request_and_is_never_unloaded_when_idle(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock()) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("vip"), descriptor("vip", pinned=True, idle_after_s=1.0))
        await until(lambda: report(manager, key_of("vip")).state is AdapterState.LOADED)
        clock.pass_s(10_000)
        manager.sweep()
        assert report(manager, key_of("vip")).state is AdapterState.LOADED
        await manager.register(key_of("vip"), descriptor("vip", pinned=False, idle_after_s=1.0))
        manager.sweep()
        await until(lambda: report(manager, key_of("vip")).state is AdapterState.REGISTERED)


async def test_an_adapter_pinned_while_it_loads_is_not_evicted(byte_tokenizer: Path) -> None:
    engine = FakeEngine(slots=1, load_s=0.2)
    async with serving(byte_tokenizer, engine=engine, slots=1) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("vip"), descriptor("vip", load=True))
        await until(lambda: manager.slots_used == 1)  # its slot is allocated, its weights are on their way
        assert report(manager, key_of("vip")).state is AdapterState.LOADING
        await manager.register(key_of("vip"), descriptor("vip", pinned=True))
        await until(lambda: report(manager, key_of("vip")).state is AdapterState.LOADED)
        await manager.register(key_of("other"), descriptor("other"))
        with pytest.raises(NoFreeSlotError):
            await acquire(manager, key_of("other"))
        assert report(manager, key_of("vip")).state is AdapterState.LOADED


async def test_registering_twice_changes_nothing_and_load_starts_at_once(served: Served) -> None:
    manager = served.runtime.adapters
    first = await manager.register(key_of("poet"), descriptor("poet", load=True))
    assert first.state is AdapterState.LOADING
    await until(lambda: report(manager, key_of("poet")).state is AdapterState.LOADED)
    again = await manager.register(key_of("poet"), descriptor("poet", load=True))
    assert again.state is AdapterState.LOADED
    assert served.engine.loads["poet"] == 1
    assert manager.registered == 1


async def test_a_terminal_failure_answers_at_once_until_the_descriptor_changes(byte_tokenizer: Path) -> None:
    store = FakeStore(errors={"s3://bucket/poet": [source_error(FailureReason.RANK_TOO_HIGH, "rank 64 is above 16")]})
    async with serving(byte_tokenizer, store=store) as served, aiohttp.ClientSession() as session:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet"))
        for _ in range(3):
            status, body, _ = await ask(served.url, key_of("poet"), session)
            assert (status, body["error"]["code"], body["error"]["message"]) == (
                422,
                "rank_too_high",
                "rank 64 is above 16",
            )
        await manager.register(key_of("poet"), descriptor("poet", load=True))
        assert report(manager, key_of("poet")).state is AdapterState.FAILED
        assert store.fetches.total() == 1
        failure = report(manager, key_of("poet")).failure
        assert (failure.reason, failure.retry_at_unix_s) == ("RankTooHigh", None)
        await manager.register(key_of("poet"), descriptor("poet", idle_after_s=7.0))
        assert (await ask(served.url, key_of("poet"), session))[0] == 422  # its files are still the same
        changed = descriptor("poet", max_bytes=5)
        await manager.register(key_of("poet"), changed)
        assert (await ask(served.url, key_of("poet"), session))[0] == 200


async def test_a_transient_failure_backs_off_and_is_tried_again(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    down = [source_error(FailureReason.SOURCE_UNAVAILABLE) for _ in range(2)]
    store = FakeStore(errors={"s3://bucket/poet": down})
    async with serving(byte_tokenizer, store=store, clock=clock.clock(), retry_base_s=10.0) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet"))
        waits = []
        for attempt in (1, 2):
            with pytest.raises(UnavailableError) as caught:
                await acquire(manager, key_of("poet"))
            assert caught.value.code == "source_unavailable"
            assert report(manager, key_of("poet")).failure.attempts == attempt
            waits.append(caught.value.retry_after_s)
            clock.pass_s(7.9 * attempt)
            with pytest.raises(UnavailableError):
                await acquire(manager, key_of("poet"))  # too early: answered without a try
            assert store.fetches.total() == attempt
            clock.pass_s(2.2 * attempt)
        assert 8.0 <= waits[0] <= 10.0
        assert 16.0 <= waits[1] <= 20.0
        (await acquire(manager, key_of("poet"))).release()
        assert report(manager, key_of("poet")).failure is None


async def test_a_source_with_another_digest_than_the_registered_one_is_a_failure(byte_tokenizer: Path) -> None:
    store = FakeStore(digests={"s3://bucket/poet": digest_of_name("something else")})
    async with serving(byte_tokenizer, store=store) as served:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        with pytest.raises(UnprocessableError) as caught:
            await acquire(served.runtime.adapters, key_of("poet"))
        assert caught.value.code == "digest_mismatch"
        assert served.engine.loads.total() == 0


async def test_files_the_engine_refuses_are_a_terminal_failure_of_that_adapter_alone(byte_tokenizer: Path) -> None:
    engine = FakeEngine(read_errors={"/fake/nan": ArtifactError(FailureReason.NON_FINITE_WEIGHTS, "lora_A holds NaN")})
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession() as session:
        for name in ("nan", "poet"):
            await served.runtime.adapters.register(key_of(name), descriptor(name))
        status, body, _ = await ask(served.url, key_of("nan"), session)
        assert (status, body["error"]["code"]) == (422, "non_finite_weights")
        status, body, _ = await ask(served.url, key_of("poet"), session)
        assert (status, said(body)) == (200, "I am poet.")


async def test_an_unforeseen_failure_of_the_engine_frees_the_slot_and_is_transient(byte_tokenizer: Path) -> None:
    engine = FakeEngine(load_error=RuntimeError("out of something"))
    async with serving(byte_tokenizer, engine=engine) as served:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        with pytest.raises(UnavailableError) as caught:
            await acquire(served.runtime.adapters, key_of("poet"))
        assert caught.value.code == "load_failed"
        assert served.runtime.adapters.slots_used == 0


async def test_requests_that_wait_for_a_load_are_bounded_and_leave_with_their_client(byte_tokenizer: Path) -> None:
    store = FakeStore(delay_s=0.3)
    async with serving(byte_tokenizer, store=store, max_load_waiting=2) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet"))
        waiting = [asyncio.create_task(acquire(manager, key_of("poet"))) for _ in range(2)]
        await until(lambda: manager.waiting == 2)
        with pytest.raises(TooManyRequestsError) as caught:
            await acquire(manager, key_of("poet"))
        assert caught.value.code == "queue_full"
        waiting[0].cancel()
        await asyncio.wait([waiting[0]])
        assert manager.waiting == 1
        (await waiting[1]).release()
        assert report(manager, key_of("poet")).in_flight == 0


async def test_a_client_that_leaves_while_its_adapter_loads_gives_its_queue_slot_back(byte_tokenizer: Path) -> None:
    store = FakeStore(delay_s=0.5)
    async with serving(byte_tokenizer, store=store) as served, aiohttp.ClientSession() as session:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        asking = asyncio.create_task(ask(served.url, key_of("poet"), session))
        await until(lambda: served.runtime.snapshot().in_flight == 1)
        asking.cancel()
        await until(lambda: served.runtime.snapshot().in_flight == 0)
        assert report(served.runtime.adapters, key_of("poet")).state is AdapterState.LOADING  # it left before the end
        await until(lambda: report(served.runtime.adapters, key_of("poet")).state is AdapterState.LOADED)
        assert served.engine.requests == []


async def test_delete_waits_for_running_requests_then_unloads_and_reports_the_bytes(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 100, step_s=0.002)
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession() as session:
        manager, path = (
            served.runtime.adapters,
            f"{served.url}/v1/adapters/{key_of('poet').uid}/{key_of('poet').digest}",
        )
        await manager.register(key_of("poet"), descriptor("poet"))
        running = asyncio.create_task(ask(served.url, key_of("poet"), session))
        await until(lambda: engine.tokens_made > 3)
        deleting = asyncio.create_task(session.delete(path))
        await until(lambda: report(manager, key_of("poet")).state is AdapterState.DRAINING)
        status, body, _ = await ask(served.url, key_of("poet"), session)
        assert (status, body["error"]["code"]) == (404, "adapter_not_registered")
        assert not deleting.done()
        status, body, _ = await running
        assert (status, said(body)) == (200, "x" * 100)
        answer = await (await deleting).json()
        assert (answer["freedDeviceBytes"], answer["freedHostBytes"]) == (2000, 1000)
        assert answer["usage"]["requests"] == 1
        assert answer["usage"]["completionTokens"] == 101
        assert manager.reports() == []
        async with session.delete(path) as response:
            assert response.status == 404
        await manager.register(key_of("poet"), descriptor("poet"))
        assert report(manager, key_of("poet")).usage.requests == 1  # per boot the numbers only grow


async def test_delete_ends_requests_that_run_longer_than_its_timeout(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.005)
    async with (
        serving(byte_tokenizer, engine=engine, drain_adapter_s=0.05) as served,
        aiohttp.ClientSession() as session,
    ):
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        running = asyncio.create_task(ask(served.url, key_of("poet"), session))
        await until(lambda: engine.tokens_made > 3)
        answer = await served.runtime.adapters.delete(key_of("poet"))
        status, body, _ = await running
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert answer.usage.failed_requests == 1
        assert answer.freed_device_bytes == 2000


async def test_delete_during_a_load_stops_it_and_answers_those_who_wait(byte_tokenizer: Path) -> None:
    store = FakeStore(delay_s=30.0)
    async with serving(byte_tokenizer, store=store) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet"))
        waiting = asyncio.create_task(acquire(manager, key_of("poet")))
        await until(lambda: manager.waiting == 1)
        async with asyncio.timeout(2):
            answer = await manager.delete(key_of("poet"))
            with pytest.raises(RuntimeNotRegisteredError):
                await waiting
        assert (answer.freed_device_bytes, answer.freed_host_bytes) == (0, 0)


async def test_two_objects_with_the_same_files_share_the_host_copy_but_not_the_slot(served: Served) -> None:
    manager, one = served.runtime.adapters, key_of("poet")
    twin = AdapterKey("uid-twin", one.digest)
    await manager.register(one, descriptor("poet"))
    await manager.register(twin, descriptor("twin", source=descriptor("poet").source))
    (await acquire(manager, one)).release()
    (await acquire(manager, twin)).release()
    assert (served.store.fetches.total(), manager.slots_used) == (1, 2)
    assert (await manager.delete(one)).freed_host_bytes == 0
    assert (await manager.delete(twin)).freed_host_bytes == 1000


async def test_host_memory_is_bounded(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer, host_cache_bytes=2500, slots=4) as served:
        manager = served.runtime.adapters
        for name in ("a", "b", "c"):
            await manager.register(key_of(name), descriptor(name))
            (await acquire(manager, key_of(name))).release()
        assert manager.host_bytes == 2000


async def test_the_longest_unused_registration_is_forgotten_when_there_are_too_many(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock(), max_adapters=3) as served:
        manager = served.runtime.adapters
        for name in ("used", "cold", "late", "latest"):
            clock.pass_s(1)
            await manager.register(key_of(name), descriptor(name))
            if name == "used":
                (await acquire(manager, key_of(name))).release()
        assert {item.display for item in manager.reports()} == {"team/used", "team/late", "team/latest"}


async def test_a_long_poll_gets_the_snapshot_at_once_when_an_adapter_changes(served: Served) -> None:
    async with aiohttp.ClientSession(served.url) as session:
        async with session.get("/v1/runtime") as response:
            first = RuntimeSnapshot.model_validate(await response.json())
        assert (first.ready, first.slots_total, first.base.served_name) == (True, 4, "tiny")
        polling = asyncio.create_task(session.get("/v1/runtime", params={"after": first.seq, "wait": "20"}))
        await asyncio.sleep(0.05)
        assert not polling.done()
        path = f"/v1/adapters/{key_of('poet').uid}/{key_of('poet').digest}"
        async with session.put(path, json=descriptor("poet").model_dump(by_alias=True)) as response:
            assert (await response.json())["adapter"]["state"] == "registered"
        async with asyncio.timeout(1):
            second = RuntimeSnapshot.model_validate(await (await polling).json())
        assert second.seq > first.seq
        assert second.adapter(*key_of("poet")) is not None
        async with session.get("/v1/runtime", params={"after": 10**9, "wait": "20"}) as response:
            assert response.status == 200  # a number of an earlier process never waits


async def test_counts_of_requests_are_announced_a_few_times_a_second(served: Served) -> None:
    before, began_s = served.runtime.changes.seq, time.monotonic()
    async with aiohttp.ClientSession() as session:
        for _ in range(20):
            async with session.post(served.url + "/v1/completions", json={"model": "tiny", "prompt": "x"}) as response:
                assert response.status == 200
        await until(lambda: served.runtime.changes.seq > before)
    periods = (time.monotonic() - began_s) / COALESCE_S
    assert served.runtime.changes.seq - before <= periods + 1  # of 40 changes, on a machine that is not very slow


async def test_events_are_numbered_and_can_be_waited_for(served: Served) -> None:
    async with aiohttp.ClientSession(served.url) as session:
        polling = asyncio.create_task(session.get("/v1/events", params={"after": 0, "wait": "20"}))
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet", load=True))
        answer = await (await polling).json()
        assert [event["type"] for event in answer["events"]] == ["loaded"]
        assert answer["events"][0]["display"] == "team/poet"
        assert (answer["firstSeq"], answer["nextSeq"]) == (1, 2)
        async with session.get("/v1/events", params={"after": 1}) as response:
            assert (await response.json())["events"] == []


async def test_resolve_inspects_a_source_and_loads_nothing(byte_tokenizer: Path) -> None:
    store = FakeStore(errors={"pvc://claim/bad": [source_error(FailureReason.WRONG_BASE, "other shapes")]})
    async with serving(byte_tokenizer, store=store) as served, aiohttp.ClientSession(served.url) as session:
        for uri, reason in (("pvc://claim/good", None), ("pvc://claim/bad", "WrongBase")):
            async with session.post("/v1/resolve", json={"source": {"uri": uri}}) as response:
                answer = ResolveAnswer.model_validate(await response.json())
            assert (answer.failure.reason if answer.failure else None) == reason
        assert served.engine.reads.total() == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/adapters/uid-1/sha256:beef", {}, "uid"),
        (f"/v1/adapters/u_id/{digest_of_name('x')}", {}, "uid"),
        (f"/v1/adapters/uid-1/{digest_of_name('x')}", {"display": "a/b"}, "source"),
        (f"/v1/adapters/uid-1/{digest_of_name('x')}", {"display": "a/b", "source": {"uri": 7}}, "source.uri"),
    ],
)
async def test_a_bad_descriptor_is_refused_by_name(served: Served, path: str, body: Any, param: str) -> None:
    async with aiohttp.ClientSession(served.url) as session, session.put(path, json=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == param
