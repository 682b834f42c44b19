"""Replicas that refuse, die or answer wrongly: another one is tried before the first byte, and never after it."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web
from fakes import FakeRuntime, digest_of
from gateway_world import KEY, World, key_of, until, world

from lorapool_api.placement import Replica, placement_order

DEAD = "http://127.0.0.1:9"


@pytest.fixture
async def here():
    async with world() as made:
        made.base(coldStart={"maxWait": "10s"})
        made.adapter("route")
        yield made


@pytest.fixture
async def runtimes():
    """Five runtimes, by pod name in the placement order of demo/route."""
    async with AsyncExitStack() as stack:
        order = placement_order("uid-demo-route", [Replica(f"uid-pod-{letter}") for letter in "abcde"])
        pods = [pod_uid.removeprefix("uid-") for pod_uid in order]
        yield {pod: await stack.enter_async_context(FakeRuntime().running()) for pod in pods}


async def test_an_unknown_adapter_is_registered_on_demand_and_asked_again_on_the_same_replica(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    for pod, runtime in runtimes.items():
        here.replica(runtime, pod)
    home, *others = runtimes.values()
    assert (await here.post(here.ask("route"))).status == 200
    descriptor = home.adapters[key_of("route")].descriptor
    assert (descriptor.display, descriptor.source.uri, descriptor.idle_after_s) == ("demo/route", "hf://org/route", 300)
    assert [len(runtime.seen) for runtime in others] == [0, 0, 0, 0]


class SlowToRegister(FakeRuntime):
    """Answers a registration only after the gate was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def _put(self, request: web.Request) -> web.Response:
        await self.gate.wait()
        return await super()._put(request)


async def test_two_hundred_concurrent_requests_for_one_cold_adapter_register_and_load_it_once(here: World) -> None:
    async with SlowToRegister().running() as runtime:
        here.replica(runtime)
        asking = asyncio.gather(*(here.post(here.ask("route")) for _ in range(200)))
        await until(lambda: len(runtime.seen) == 200)  # all were refused: the adapter is not registered
        runtime.gate.set()
        assert {response.status for response in await asking} == {200}
    assert len(runtime.puts) == 1
    assert runtime.adapters[key_of("route")].loads == 1


async def test_no_slot_is_tried_on_two_more_replicas_in_placement_order_and_then_held(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    here.base(coldStart={"maxWait": "0s"})
    for pod, runtime in runtimes.items():
        runtime.faults.no_slot = True
        here.replica(runtime, pod)
    response = await here.post(here.ask("route"))
    assert (response.status, (await response.json())["error"]["code"]) == (503, "no_slot")
    asked = [bool(runtime.seen) for runtime in runtimes.values()]
    assert asked == [True, True, True, False, False]
    assert here.sample("retries_total", base="demo/tiny", reason="no_slot") == 3


async def test_a_slot_that_comes_free_while_a_request_is_held_answers_it(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    runtime.faults.no_slot = True
    here.replica(runtime, pod)
    asking = asyncio.create_task(here.post(here.ask("route")))
    await until(lambda: len(runtime.seen) >= 2)
    runtime.faults.no_slot = False
    assert (await asking).status == 200


async def test_a_replica_that_has_the_adapter_is_preferred_to_its_home(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    *_, last = runtimes.values()
    last.have(key_of("route"), "demo/route")
    for pod, runtime in runtimes.items():
        here.replica(runtime, pod)
    await here.post(here.ask("route"))
    assert len(last.seen) == 1


@pytest.mark.parametrize("fault", ["draining", "queue_full", "starting"])
async def test_a_replica_that_takes_nothing_is_passed_over(
    here: World, runtimes: dict[str, FakeRuntime], fault: str
) -> None:
    for pod, runtime in runtimes.items():
        here.replica(runtime, pod)
    first, second, *_ = runtimes.values()
    if fault == "starting":
        first.ready = False
    else:
        setattr(first.faults, fault, True)  # the snapshot the gateway has does not know yet
    assert (await here.post(here.ask("route"))).status == 200
    assert len(second.seen) > 0
    assert here.sample("retries_total", base="demo/tiny", reason=fault) == 1


async def test_a_dead_address_costs_one_refused_connection(here: World, runtimes: dict[str, FakeRuntime]) -> None:
    pods = list(runtimes)
    here.replica(DEAD, pods[0])
    here.replica(runtimes[pods[1]], pods[1])
    response = await here.post(here.ask("route"))
    assert response.status == 200
    assert here.sample("retries_total", base="demo/tiny", reason="connect") == 1


async def test_only_dead_addresses_hold_the_request_until_a_new_pod_is_ready(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    pods = list(runtimes)
    here.replica(DEAD, pods[0])
    asking = asyncio.create_task(here.post(here.ask("route")))
    await until(lambda: here.sample("retries_total", base="demo/tiny", reason="connect") >= 1)
    here.gone(pods[0])
    here.replica(runtimes[pods[1]], pods[1])
    assert (await asking).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_lost_before_the_answers_head_is_tried_once_more(
    here: World, runtimes: dict[str, FakeRuntime], stream: bool
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    runtime.have(key_of("route"), "demo/route")
    here.replica(runtime, pod)
    runtime.faults.die_before_head = 1
    assert (await here.post(here.ask("route", stream=stream))).status == 200
    assert here.sample("retries_total", base="demo/tiny", reason="lost") == 1
    runtime.faults.die_before_head = 2
    response = await here.post(here.ask("route", stream=stream))
    assert (response.status, (await response.json())["error"]["code"]) == (503, "upstream_lost")
    assert runtime.faults.die_before_head == 0
    assert len(runtime.seen) == 4


async def test_a_whole_answer_cut_half_way_is_an_error_and_never_sent_again(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    here.replica(runtime, pod)
    await here.post(here.ask("route"))
    runtime.faults.die_mid_body = 1
    before = len(runtime.seen)
    response = await here.post(here.ask("route"))
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert len(runtime.seen) == before + 1


@pytest.mark.parametrize("fault", ["die", "end_early"])
async def test_a_stream_that_breaks_off_ends_with_an_error_event_and_no_done(
    here: World, runtimes: dict[str, FakeRuntime], fault: str
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    runtime.have(key_of("route"), "demo/route")
    here.replica(runtime, pod)
    if fault == "die":
        runtime.faults.die_after_events = 3
        runtime.token_s = 0.01
    else:
        runtime.faults.end_early = True
    headers = {"Authorization": f"Bearer {KEY}"}
    url, body = f"{here.url}/v1/chat/completions", here.ask("route", stream=True)
    async with here.session.post(url, json=body, headers=headers) as response:
        text = (await response.read()).decode()
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert "[DONE]" not in text
    assert events[-1]["error"]["code"] == "upstream_lost"
    assert len(events) == (3 if fault == "die" else 6) + 1
    assert len(runtime.seen) == 1
    await until(lambda: here.gateway.in_flight == 0)
    assert here.sample("requests_total", base="demo/tiny", adapter="demo/route", code="502") == 1
    completion = here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type="completion")
    assert completion == len(events) - 1


async def test_a_client_that_leaves_mid_stream_ends_the_generation_and_its_tokens_are_counted(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    runtime.have(key_of("route"), "demo/route")
    runtime.words, runtime.token_s = 1000, 0.01
    here.replica(runtime, pod)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{here.url}/v1/chat/completions", json=here.ask("route", stream=True), headers=headers
        ) as response,
    ):
        for _ in range(10):
            await response.content.readuntil(b"\n\n")
        response.close()
    await until(lambda: runtime.seen[-1].cancelled)
    await until(lambda: here.gateway.in_flight == 0)
    counted = here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type="completion")
    assert runtime.seen[-1].completion_tokens - 2 <= counted <= runtime.seen[-1].completion_tokens
    assert here.sample("requests_total", base="demo/tiny", adapter="demo/route", code="499") == 1
    assert here.runtimes.in_flight == {}


async def test_a_client_that_takes_nothing_of_its_stream_is_dropped_and_others_go_on(
    runtimes: dict[str, FakeRuntime],
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    runtime.have(key_of("route"), "demo/route")
    runtime.words, runtime.filler = 5000, "w" * 8192  # 40 MB, far more than socket buffers hold
    async with world(write_timeout_s=0.3) as here:
        here.base()
        here.adapter("route")
        here.replica(runtime, pod)
        host, port = here.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = json.dumps(here.ask("route", stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readline()  # and then nothing any more
        await until(lambda: runtime.seen and runtime.seen[-1].cancelled)
        await until(lambda: here.gateway.in_flight == 0)
        assert runtime.seen[-1].completion_tokens < 5000
        runtime.words = 6
        assert (await here.post(here.ask("route"))).status == 200
        writer.close()


async def test_a_client_that_leaves_a_whole_answer_ends_the_generation(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    runtime.have(key_of("route"), "demo/route")
    runtime.token_s = 5
    here.replica(runtime, pod)
    with pytest.raises(TimeoutError):
        await here.post(here.ask("route"), timeout=aiohttp.ClientTimeout(total=0.2))
    await until(lambda: runtime.seen[-1].cancelled)
    await until(lambda: here.runtimes.in_flight == {})


async def test_a_new_digest_answers_wholly_new_and_an_answer_under_way_stays_wholly_old(
    here: World, runtimes: dict[str, FakeRuntime]
) -> None:
    pod, runtime = next(iter(runtimes.items()))
    runtime.have(key_of("route"), "demo/route")
    runtime.token_s = 0.02
    here.replica(runtime, pod)
    under_way = asyncio.create_task(here.post(here.ask("route", stream=True)))
    await until(lambda: runtime.seen)
    new = digest_of("route v2")
    conditions = [{"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2026-01-01T00:00:00Z"}]
    here.adapter("route", status={"observedGeneration": 1, "digest": new, "conditions": conditions})
    after = await here.post(here.ask("route"))
    before = await under_way
    assert after.headers["x-lorapool-adapter"] == f"demo/route@{new}"
    assert new in await after.text()
    assert before.headers["x-lorapool-adapter"] == f"demo/route@{digest_of('route')}"
    assert new not in await before.text()


async def test_usage_is_counted_exactly_over_many_mixed_requests(here: World, runtimes: dict[str, FakeRuntime]) -> None:
    pod, runtime = next(iter(runtimes.items()))
    here.replica(runtime, pod)
    bodies = [here.ask("route" if i % 3 else "tiny", "one two three", stream=bool(i % 2)) for i in range(60)]
    answers = await asyncio.gather(*(here.post(body) for body in bodies))
    assert {answer.status for answer in answers} == {200}
    assert here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type="prompt") == 40 * 3
    assert here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type="completion") == 40 * 6
    assert here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion") == 20 * 6
    assert here.sample("requests_total", base="demo/tiny", adapter="demo/route", code="200") == 40


async def test_a_pod_killed_at_any_moment_loses_only_the_whole_answers_that_it_had_admitted(here: World) -> None:
    async with FakeRuntime().running() as heir:
        for trial in range(60):
            async with FakeRuntime(token_s=0.002).running() as dying:
                here.replica(dying, "pod-old")
                warm = await here.post(here.ask("route"))  # leaves a pooled connection that dies with it
                asking = [asyncio.create_task(here.post(here.ask("route"))) for _ in range(3)]
                await asyncio.sleep(trial * 0.0005)
                await dying.kill()
                late = asyncio.create_task(here.post(here.ask("route")))
                await asyncio.sleep(0.002)
                here.gone("pod-old")
                here.replica(heir, "pod-new")
                answers = [warm, *await asyncio.gather(*asking, late)]
                here.gone("pod-new")
            whole = [answer for answer in answers if answer.status == 200]
            lost = [answer for answer in answers if answer.status != 200]
            assert answers[0] in whole, trial
            assert {(await answer.json())["error"]["code"] for answer in lost} <= {"upstream_lost"}
            assert {answer.headers["x-lorapool-adapter"] for answer in whole} == {f"demo/route@{digest_of('route')}"}
            seen = [*dying.seen, *heir.seen]
            computed = [item.headers["x-request-id"] for item in seen if item.completion_tokens]
            assert len(computed) == len(set(computed)), trial
