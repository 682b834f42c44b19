"""Pods that are lost without a reset: a request goes elsewhere until it is admitted, and is never computed twice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import aiohttp
import pytest
from fakes import FailsLate, FakeRuntime
from gateway_world import World, cut_after, key_of, until, world

from lorapool_api.keep_alive import DEAD_PEER_S
from lorapool_gateway.process import poll_socket
from lorapool_gateway.requests import pod_watch
from lorapool_gateway.requests.http_client import HttpClient
from lorapool_gateway.requests.http_response import ReadTimeoutError
from lorapool_gateway.routing.outliers import EJECTION_MAX_S, EJECTION_S, Outliers


class Mute:
    """Accepts connections, reads, and never answers, as a process that hangs."""

    def __init__(self) -> None:
        self.url = ""
        self.asked = 0
        self.left = 0
        """Connections that the gateway has closed."""


@asynccontextmanager
async def mute() -> AsyncIterator[Mute]:
    made = Mute()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        made.asked += 1
        try:
            while await reader.read(65536):
                pass
        except ConnectionError:
            pass
        made.left += 1
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()


@pytest.fixture
async def here():
    async with world() as made:
        made.base(coldStart={"maxWait": "5s"})
        made.adapter("route")
        yield made


@pytest.fixture
async def dead():
    async with mute() as made:
        yield made


@pytest.fixture
async def good():
    async with FakeRuntime().running() as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_at_a_silent_pod_that_leaves_the_table_is_answered_by_another(
    here: World, dead: Mute, good: FakeRuntime, stream: bool
) -> None:
    here.replica(dead.url, "pod-dead")
    asking = asyncio.create_task(here.post(here.ask("tiny", stream=stream)))
    await until(lambda: dead.asked)
    here.gone("pod-dead")
    here.replica(good, "pod-new")
    response = await asyncio.wait_for(asking, 20)
    assert (response.status, len(good.seen), dead.asked) == (200, 1, 1)
    assert here.sample("retries_total", base="demo/tiny", reason="silent") == 1
    await until(lambda: dead.left)


async def test_a_request_at_a_pod_whose_poll_fails_is_answered_by_another(
    here: World, dead: Mute, good: FakeRuntime
) -> None:
    here.replica(dead.url, "pod-dead")
    asking = asyncio.create_task(here.post(here.ask("tiny")))
    await until(lambda: dead.asked)
    here.replica(good, "pod-good")
    here.replica(dead.url, "pod-dead", poll_failed=True)
    assert (await asyncio.wait_for(asking, 20)).status == 200


async def test_a_pod_that_answers_no_poll_is_left_after_a_bound_and_one_that_does_may_take_longer(
    here: World, dead: Mute, good: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_watch, "SILENCE_S", 0.1)
    here.replica(dead.url, "pod-a")
    here.replica(good, "pod-b")
    good.token_s = 0.1
    answers = await asyncio.gather(*(here.post(here.ask("tiny")) for _ in range(2)))
    assert {answer.status for answer in answers} == {200}
    assert dead.asked >= 1
    assert len(good.seen) == 2


async def test_a_slow_load_is_waited_for_while_the_pod_answers_its_polls(
    here: World, good: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_watch, "SILENCE_S", 0.1)
    good.load_s = 0.5
    here.replica(good)
    assert (await here.post(here.ask("route"))).status == 200
    assert good.adapters[key_of("route")].loads == 1


async def test_a_stream_goes_on_while_its_pods_poll_fails_and_ends_when_it_falls_silent(
    here: World, good: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_watch, "SILENCE_S", 0.3)
    good.words, good.token_s = 20, 0.05
    here.replica(good)
    asking = asyncio.create_task(here.post(here.ask("tiny", stream=True)))
    await until(lambda: good.seen and good.seen[-1].completion_tokens)
    here.replica(good, poll_failed=True)
    response = await asking
    assert "[DONE]" in await response.text()
    good.token_s = 30
    response = await asyncio.wait_for(here.post(here.ask("tiny")), 10)
    assert (response.status, (await response.json())["error"]["code"]) == (503, "upstream_lost")
    assert len(good.seen) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_an_admitted_request_whose_runtime_is_lost_is_computed_once_and_its_tokens_are_counted(
    here: World, good: FakeRuntime, stream: bool
) -> None:
    good.words, good.token_s = 200, 0.002
    here.replica(good)
    asking = asyncio.create_task(here.post(here.ask("tiny", stream=stream)))
    await cut_after(good, 180)
    response = await asking
    text = await response.text()
    assert "upstream_lost" in text
    assert response.status == (200 if stream else 503)
    assert len(good.seen) == 1
    assert here.sample("retries_total", base="demo/tiny", reason="lost") == 0
    await until(lambda: here.gateway.in_flight == 0)
    counted = here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion")
    assert 170 <= counted <= good.seen[0].completion_tokens
    if stream:
        assert counted == text.count('"delta": {"content"')


async def test_a_whole_answer_whose_client_leaves_is_counted(here: World, good: FakeRuntime) -> None:
    good.words, good.token_s = 1000, 0.01
    here.replica(good)
    with pytest.raises(TimeoutError):
        await here.post(here.ask("tiny"), timeout=aiohttp.ClientTimeout(total=0.5))
    await until(lambda: here.gateway.in_flight == 0)
    assert here.sample("requests_total", base="demo/tiny", adapter="base", code="499") == 1
    counted = here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion")
    assert 0 < counted <= good.seen[0].completion_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_ended_at_its_deadline_and_counted(good: FakeRuntime, stream: bool) -> None:
    good.words, good.token_s = 1000, 0.01
    async with world(deadline_s=0.3) as here:
        here.base()
        here.replica(good)
        response = await here.post(here.ask("tiny", stream=stream))
        assert "deadline_exceeded" in await response.text()
        assert response.status == (200 if stream else 503)
        await until(lambda: good.seen[0].cancelled and here.gateway.in_flight == 0)
        assert here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion") > 0


async def test_a_request_that_is_held_is_ended_at_its_deadline() -> None:
    async with world(deadline_s=0.1) as here:
        here.base(replicas=0)
        response = await here.post(here.ask("tiny"))
    assert (response.status, (await response.json())["error"]["code"]) == (503, "deadline_exceeded")


async def test_an_error_after_the_admission_of_a_whole_answer_is_the_clients_error(here: World) -> None:
    async with FailsLate().running() as runtime:
        here.replica(runtime)
        response = await here.post(here.ask("tiny"))
    assert (response.status, (await response.json())["error"]["message"]) == (500, "The engine failed.")
    assert here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion") == 6


async def test_a_runtime_of_an_earlier_version_is_understood(here: World) -> None:
    async with FakeRuntime(sends_events=False).running() as runtime:
        here.replica(runtime)
        whole, stream = [await here.post(here.ask("tiny", stream=stream)) for stream in (False, True)]
    assert (whole.status, stream.status) == (200, 200)
    assert (await whole.json())["usage"]["completion_tokens"] == 6
    assert "[DONE]" in await stream.text()
    assert here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion") == 12


# --- ejection -----------------------------------------------------------------------------


async def test_a_pod_that_was_lost_is_asked_after_the_others(here: World, dead: Mute, good: FakeRuntime) -> None:
    here.replica("http://127.0.0.1:9", "pod-a")
    here.replica(good, "pod-b")
    for _ in range(5):
        assert (await here.post(here.ask("tiny"))).status == 200
    assert here.sample("retries_total", base="demo/tiny", reason="connect") <= 1


def test_each_failure_in_a_row_ejects_for_longer_and_an_answer_ends_the_row() -> None:
    outliers, now_s, ejections = Outliers(), 100.0, []
    for _ in range(8):
        outliers.failed("a", now_s)
        began_s = now_s
        while "a" in outliers.ejected(now_s):
            now_s += EJECTION_S
        ejections.append(now_s - began_s)
    assert ejections == [1, 2, 4, 8, 16, 32, EJECTION_MAX_S, EJECTION_MAX_S]
    outliers.answered("a")
    outliers.failed("a", now_s)
    assert outliers.ejected(now_s + EJECTION_S) == frozenset()


def test_failures_of_requests_that_were_sent_before_the_ejection_do_not_prolong_it() -> None:
    outliers = Outliers()
    for _ in range(50):
        outliers.failed("a", 0.0)
    assert outliers.ejected(EJECTION_S - 0.1) == {"a"}
    assert outliers.ejected(EJECTION_S) == frozenset()


def test_a_pod_that_does_not_exist_any_more_is_forgotten() -> None:
    outliers = Outliers()
    outliers.failed("a", 0.0)
    outliers.failed("b", EJECTION_S + EJECTION_MAX_S)
    assert list(outliers._pods) == ["b"]


# --- sockets ------------------------------------------------------------------------------


def options(connection: socket.socket) -> tuple[bool, int]:
    alive = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return bool(alive), connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


async def test_the_kernel_ends_connections_to_runtimes_whose_machine_is_lost(dead: Mute) -> None:
    http = HttpClient()
    response = await http.send(dead.url, "POST", "/", {}, b"")
    transport = cast(asyncio.Transport, response._connection.transport)  # type: ignore[union-attr]
    assert options(transport.get_extra_info("socket")) == (True, DEAD_PEER_S * 1000)
    response.close()
    await http.close()


def test_the_kernel_ends_polls_of_runtimes_whose_machine_is_lost() -> None:
    with poll_socket((socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 9))) as made:
        assert options(made) == (True, DEAD_PEER_S * 1000)


async def test_a_limit_of_silence_begins_when_it_is_set(dead: Mute) -> None:
    http = HttpClient()
    response = await http.send(dead.url, "POST", "/", {}, b"")
    response._last_s -= 100  # a load or a long prompt, during which the pod's poll fails once
    response.limit_silence(50)
    assert response._error is None
    response._last_s -= 100
    response.check_time(asyncio.get_running_loop().time())
    with pytest.raises(ReadTimeoutError):
        await response.head()
    await http.close()
