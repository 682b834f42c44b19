"""Requests that no replica can answer yet: held, bounded in number and time, and never lost."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import aiohttp
import openai
import pytest
from fakes import FakeRuntime, digest_of
from gateway_world import KEY, World, condition, failed_status, key_of, ready_status, until, world

from lorapool_gateway.requests.wake import ScaleWaker
from lorapool_gateway.routing.objects import BaseRoute, ObjectRef, base_route
from lorapool_gateway.routing.source import ScaleResult, scaled_up

UNCHECKED: dict[str, object] = {}


@pytest.fixture
async def runtime():
    async with FakeRuntime().running() as fake:
        yield fake


@pytest.fixture
async def here():
    """A base at zero replicas and an adapter that is Ready but not loaded."""
    async with world() as made:
        made.base(replicas=0, coldStart={"maxWait": "20s", "maxQueued": 256})
        made.adapter("route")
        yield made


async def test_a_request_to_a_sleeping_base_wakes_it_and_is_answered_when_a_replica_is_ready(
    here: World, runtime: FakeRuntime
) -> None:
    asking = asyncio.create_task(here.post(here.ask("route")))
    await until(lambda: here.waker.woken)
    assert here.waker.woken[0] == ObjectRef("demo", "tiny")
    assert here.sample("held_requests", base="demo/tiny") == 1
    await asyncio.sleep(0.05)
    here.replica(runtime)
    began_s = time.monotonic()
    response = await asking
    assert time.monotonic() - began_s < 0.5
    assert response.status == 200
    assert response.headers["x-lorapool-adapter"] == f"demo/route@{digest_of('route')}"
    assert int(response.headers["x-lorapool-cold-start-ms"]) >= 50
    assert here.sample("held_requests", base="demo/tiny") == 0
    assert here.sample("activation_seconds_count", base="demo/tiny") == 1
    assert here.sample("request_duration_seconds_count", base="demo/tiny", start="cold") == 1


async def test_200_held_requests_bring_one_wake_and_all_are_answered(here: World, runtime: FakeRuntime) -> None:
    scaled: list[ObjectRef] = []

    class Scale:
        async def scale_up(self, ref: ObjectRef, add: int, bound: int) -> ScaleResult:
            scaled.append(ref)
            await asyncio.sleep(0.05)
            return ScaleResult.WOKEN

    waker = ScaleWaker(Scale(), here.metrics.wake)
    here.waker.wake = waker.wake  # type: ignore[method-assign]
    asking = [asyncio.create_task(here.post(here.ask("route"))) for _ in range(200)]
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 200)
    here.publish()  # a change of the table makes each look again
    await asyncio.sleep(0.1)
    here.replica(runtime)
    answers = await asyncio.gather(*asking)
    await waker.close()
    assert [answer.status for answer in answers] == [200] * 200
    assert scaled == [ObjectRef("demo", "tiny")]
    assert here.sample("wakes_total", base="demo/tiny", result="woken") == 1
    assert runtime.adapters[key_of("route")].loads == 1


async def test_the_request_over_the_bound_gets_429_with_retry_after(here: World, runtime: FakeRuntime) -> None:
    here.base(replicas=0, coldStart={"maxWait": "20s", "maxQueued": 3})
    asking = [asyncio.create_task(here.post(here.ask("route"))) for _ in range(3)]
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 3)
    refused = await here.post(here.ask("route"))
    assert (refused.status, refused.headers["Retry-After"]) == (429, "2")
    assert (await refused.json())["error"]["code"] == "too_many_held_requests"
    here.replica(runtime)
    assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 3


async def test_a_held_request_gets_503_with_retry_after_at_the_deadline(here: World) -> None:
    here.base(replicas=0, coldStart={"maxWait": "1s"})
    began_s = time.monotonic()
    response = await here.post(here.ask("route"))
    assert 0.95 < time.monotonic() - began_s < 2
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert (await response.json())["error"]["code"] == "cold_start_timeout"


async def test_a_base_that_failed_to_start_is_not_started_again_before_its_time(
    here: World, runtime: FakeRuntime
) -> None:
    soon = datetime.fromtimestamp(time.time() + 40, UTC).isoformat()
    here.base(replicas=0)
    here.bases["demo/tiny"]["status"] = {"start": {"failures": 1, "reason": "ImagePullFailed", "retryAt": soon}}
    here.publish()
    response = await here.post(here.ask("route"))
    assert response.status == 503
    assert 35 <= int(response.headers["Retry-After"]) <= 41
    error = (await response.json())["error"]
    assert error["code"] == "base_start_failed"
    assert "ImagePullFailed" in error["message"]
    assert here.waker.woken == []
    here.bases["demo/tiny"]["status"]["start"]["retryAt"] = "2026-01-01T00:00:00Z"
    here.publish()
    asking = asyncio.create_task(here.post(here.ask("route")))
    await until(lambda: here.waker.woken)
    here.replica(runtime)
    assert (await asking).status == 200


async def test_a_base_that_a_person_starts_again_holds_requests_even_before_its_time(
    here: World, runtime: FakeRuntime
) -> None:
    soon = datetime.fromtimestamp(time.time() + 40, UTC).isoformat()
    here.base(replicas=1)
    here.bases["demo/tiny"]["status"] = {"start": {"failures": 1, "reason": "ImagePullFailed", "retryAt": soon}}
    here.publish()
    asking = asyncio.create_task(here.post(here.ask("route")))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
    here.replica(runtime)
    assert (await asking).status == 200


async def test_the_openai_clients_own_retry_rides_out_a_cold_start(here: World, runtime: FakeRuntime) -> None:
    here.base(replicas=0, coldStart={"maxWait": "0s"})
    async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key=KEY, max_retries=2) as client:
        asking = asyncio.create_task(
            client.chat.completions.create(model="route", messages=[{"role": "user", "content": "hi"}])
        )
        await until(lambda: here.waker.woken)
        here.replica(runtime)
        answer = await asyncio.wait_for(asking, 10)
    assert answer.choices[0].message.content


async def test_a_client_that_leaves_gives_its_place_back(here: World) -> None:
    here.base(replicas=0, coldStart={"maxWait": "20s", "maxQueued": 1})
    with pytest.raises(TimeoutError):
        await here.post(here.ask("route"), timeout=aiohttp.ClientTimeout(total=0.1))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 0)
    await until(lambda: here.gateway.in_flight == 0)
    assert here.sample("requests_total", base="demo/tiny", adapter="demo/route", code="499") == 1


async def test_a_request_for_an_unchecked_adapter_is_held_until_it_is_checked(
    here: World, runtime: FakeRuntime
) -> None:
    here.replica(runtime)
    here.adapter("new", status=UNCHECKED)
    asking = asyncio.create_task(here.post(here.ask("new")))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
    assert here.waker.woken == []
    here.adapter("new", status=ready_status(digest_of("new")))
    response = await asking
    assert (response.status, response.headers["x-lorapool-adapter"]) == (200, f"demo/new@{digest_of('new')}")


async def test_a_held_request_gets_the_terminal_failure_as_soon_as_it_is_known(here: World) -> None:
    here.adapter("new", status=UNCHECKED)
    asking = asyncio.create_task(here.post(here.ask("new")))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
    here.adapter("new", status=failed_status("UnsupportedFormat", "only safetensors; convert the pickle"))
    began_s = time.monotonic()
    response = await asking
    assert time.monotonic() - began_s < 1
    assert (response.status, (await response.json())["error"]["code"]) == (422, "unsupported_format")


async def test_a_source_that_is_down_is_answered_at_once_with_the_time_of_its_next_check(here: World) -> None:
    retry_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 30))
    here.adapter("slow", status=failed_status("SourceTimeout", "the hub did not answer", retryAt=retry_at))
    response = await asyncio.wait_for(here.post(here.ask("slow")), 10)  # far less than maxWait
    assert (response.status, (await response.json())["error"]["code"]) == (503, "source_timeout")
    assert 25 <= int(response.headers["Retry-After"]) <= 31
    assert here.waker.woken == []


async def test_a_request_held_during_a_check_is_answered_when_the_check_fails(here: World) -> None:
    here.adapter("slow", status=failed_status("SourceTimeout", "m", retryAt="2020-01-01T00:00:00Z"))
    asking = asyncio.create_task(here.post(here.ask("slow")))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
    retry_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 30))
    here.adapter("slow", status=failed_status("SourceTimeout", "m", retryAt=retry_at))
    assert (await asyncio.wait_for(asking, 10)).status == 503


async def test_one_broken_adapter_does_not_fill_the_line_of_its_base(here: World, runtime: FakeRuntime) -> None:
    here.base(replicas=0, coldStart={"maxWait": "20s", "maxQueued": 2})
    here.adapter("new", status=UNCHECKED)
    stuck = [asyncio.create_task(here.post(here.ask("new"))) for _ in range(2)]
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 2)
    assert (await here.post(here.ask("new"))).status == 429
    asking = asyncio.create_task(here.post(here.ask("route")))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 3)
    here.replica(runtime)
    assert (await asking).status == 200
    for task in stuck:
        task.cancel()


async def test_a_source_only_a_runtime_can_read_wakes_the_base_and_waits_for_the_digest(
    here: World, runtime: FakeRuntime
) -> None:
    awaiting = {"observedGeneration": 1, "conditions": [condition("Resolved", "Unknown", "AwaitingRuntime")]}
    here.adapter("local", status=awaiting)
    asking = asyncio.create_task(here.post(here.ask("local")))
    await until(lambda: here.waker.woken)
    here.replica(runtime)
    here.adapter("local", status=ready_status(digest_of("local")))
    assert (await asking).headers["x-lorapool-adapter"] == f"demo/local@{digest_of('local')}"


async def test_an_adapter_deleted_while_its_request_is_held_becomes_404(here: World) -> None:
    asking = asyncio.create_task(here.post(here.ask("route")))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
    here.adapters.clear()
    here.publish()
    assert (await asking).status == 404


async def test_a_load_that_outlasts_the_deadline_is_given_up_but_a_long_answer_is_not(
    here: World, runtime: FakeRuntime
) -> None:
    here.base(replicas=1, coldStart={"maxWait": "1s"})
    here.replica(runtime)
    runtime.load_s = 30
    response = await here.post(here.ask("route"))
    assert (response.status, (await response.json())["error"]["code"]) == (503, "load_timeout")
    await until(lambda: runtime.seen[-1].cancelled)
    runtime.have(key_of("route"), "demo/route")
    here.replica(runtime)
    runtime.token_s = 2.4 / runtime.words  # past the deadline, but generating
    assert (await here.post(here.ask("route"))).status == 200


async def test_a_cold_load_in_the_runtime_is_reported_and_counted_as_cold(here: World, runtime: FakeRuntime) -> None:
    here.replica(runtime)
    runtime.load_s = 0.1
    cold = await here.post(here.ask("route"))
    warm = await here.post(here.ask("route"))
    assert int(cold.headers["x-lorapool-cold-start-ms"]) >= 100
    assert "x-lorapool-cold-start-ms" not in warm.headers


def sleeping(**more) -> BaseRoute:
    raw = {"metadata": {"name": "b", "namespace": "n", "uid": "u"}, "spec": {"source": {"uri": "hf://org/b"}, **more}}
    return base_route(raw)


async def test_a_wake_that_fails_is_tried_again_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[str] = []
    calls = 0

    class Broken:
        async def scale_up(self, ref: ObjectRef, add: int, bound: int) -> ScaleResult:
            nonlocal calls
            calls += 1
            raise OSError("no API server")

    waker = ScaleWaker(Broken(), lambda base, result: results.append(result), settle_s=0)
    monkeypatch.setattr("lorapool_gateway.requests.wake.BACKOFF_S", (0.001,) * 4)
    waker.wake(sleeping(replicas=0), 0)
    waker.wake(sleeping(replicas=0), 0)
    await until(lambda: results)
    assert (calls, results) == (5, ["failed"])


async def test_a_base_that_is_wanted_up_is_never_woken() -> None:
    class Never:
        async def scale_up(self, ref: ObjectRef, add: int, bound: int) -> ScaleResult:
            raise AssertionError("not for this base")

    waker = ScaleWaker(Never(), lambda base, result: None)
    waker.wake(sleeping(replicas=1), 1)
    waker.wake(sleeping(scaling={"minReplicas": 1}), 1)
    await asyncio.sleep(0)
    await waker.close()


class Replicas:
    """A base's number of replicas, as the scale subresource keeps it."""

    def __init__(self, replicas: int = 0) -> None:
        self.replicas = replicas

    async def scale_up(self, ref: ObjectRef, add: int, bound: int) -> ScaleResult:
        before, self.replicas = self.replicas, scaled_up(self.replicas, add, bound)
        return ScaleResult.ALREADY_UP if self.replicas == before else ScaleResult.WOKEN


async def wake(waker: ScaleWaker, scale: Replicas, held: int, **scaling: object) -> int:
    base = sleeping(replicas=scale.replicas, scaling={"maxReplicas": 4, "targetInFlight": 16, **scaling})
    waker.wake(base, held)
    await until(lambda: not waker.busy)
    return scale.replicas


async def test_a_burst_on_a_base_without_a_replica_starts_as_many_as_it_fills() -> None:
    scale = Replicas()
    waker = ScaleWaker(scale, lambda base, result: None, settle_s=0)
    assert await wake(waker, scale, 0) == 1
    assert await wake(waker, scale, 31) == 1
    assert await wake(waker, scale, 63) == 3
    assert await wake(waker, scale, 64) == 4
    assert await wake(waker, scale, 1000) == 4


async def test_the_held_requests_of_several_gateways_add_up() -> None:
    scale = Replicas()
    first, second = (ScaleWaker(scale, lambda base, result: None, settle_s=0) for _ in range(2))
    await wake(first, scale, 3)
    assert await wake(second, scale, 3) == 1
    await wake(first, scale, 32)
    assert await wake(second, scale, 32) == 4


async def test_a_share_is_asked_for_again_after_the_base_was_scaled_to_zero() -> None:
    scale = Replicas()
    waker = ScaleWaker(scale, lambda base, result: None, settle_s=0)
    assert await wake(waker, scale, 40) == 2
    scale.replicas = 0
    assert await wake(waker, scale, 40) == 2


async def test_an_external_autoscalers_base_is_woken_and_never_scaled_further() -> None:
    scale = Replicas()
    waker = ScaleWaker(scale, lambda base, result: None, settle_s=0)
    assert await wake(waker, scale, 500, mode="External") == 1
    assert await wake(waker, scale, 500, mode="External") == 1
