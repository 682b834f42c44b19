"""A gateway that stops: requests in flight finish, and those that take longer than it may wait end with an error."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fakes import FakeRuntime
from gateway_world import KEY, World, until, world

from lorapool_gateway.process import GatewayProcess, drain

ERROR = '"code": "draining"'


@pytest.fixture
async def runtime():
    async with FakeRuntime(words=100_000, token_s=0.001).running() as made:
        yield made


@pytest.fixture
async def here(runtime: FakeRuntime):
    async with world(drain_timeout_s=0.05) as made:
        made.base()
        made.adapter("route")
        made.replica(runtime)
        yield made


async def stop(here: World) -> None:
    """Drains it as its process does on SIGTERM."""

    async def close_listener() -> None:
        pass

    settings = here.settings.model_copy(update={"shutdown_delay_s": 0.0})
    process = SimpleNamespace(gateway=here.gateway, api_site=SimpleNamespace(stop=close_listener))
    await drain(cast(GatewayProcess, process), settings)


async def ask(here: World, body: dict[str, Any]) -> tuple[int, str, str]:
    response = await here.post(body)
    return response.status, response.headers.get("Retry-After", ""), await response.text()


async def test_a_stream_that_takes_longer_ends_with_an_error_event_and_done(here: World, runtime: FakeRuntime) -> None:
    asking = asyncio.create_task(ask(here, here.ask("route", stream=True)))
    await until(lambda: runtime.seen and runtime.seen[-1].completion_tokens > 2)
    await stop(here)
    status, _, text = await asking
    assert status == 200
    assert text.count("data: ") > 1
    *_, error, done = text.rstrip().split("\n\n")
    assert ERROR in error
    assert done == "data: [DONE]"
    assert here.sample("requests_total", base="demo/tiny", adapter="demo/route", code="502") == 1


async def test_a_whole_answer_that_takes_longer_and_a_held_request_get_503(here: World) -> None:
    here.base("asleep", replicas=0)
    bodies = [here.ask("route"), here.ask("demo/asleep")]
    asking = [asyncio.create_task(ask(here, body)) for body in bodies]
    await until(lambda: here.gateway.in_flight == 2)
    await stop(here)
    for status, retry_after, text in await asyncio.gather(*asking):
        assert (status, retry_after) == (503, "1")
        assert ERROR in text
    assert here.gateway.in_flight == 0


async def test_the_connection_of_a_stream_that_ends_while_it_stops_is_closed() -> None:
    async with FakeRuntime(words=20, token_s=0.01).running() as runtime, world() as here:
        here.base()
        here.replica(runtime)
        body = json.dumps(here.ask("demo/tiny", stream=True))
        head = f"Host: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
        reader, writer = await asyncio.open_connection("127.0.0.1", int(here.url.rpartition(":")[2]))
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
        await reader.readuntil(b"data: ")
        here.gateway.draining = True
        async with asyncio.timeout(60):  # an open connection would never end
            rest = await reader.read()
        writer.close()
    assert b"data: [DONE]" in rest
