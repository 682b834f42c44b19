"""Gateway, runtime and client count the same tokens, at whichever moment one of them is lost.

The runtime's server is the true one, its engine is a fake: every token of an answer is one character.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import FakeEngine, Served, save_byte_tokenizer, serving
from gateway_world import World, key_of, until, world

from lorapool_api.protocol import token_sha256
from lorapool_api.usage_protocol import Ended, RequestRecord, UsagePage
from lorapool_runtime.serving import responses

TOKEN = "t" * 64
MOMENTS = (1, 2, 3, 5, 8, 13, 21, 34)
"""Tokens that the engine has generated when something is lost."""


class Proxy:
    """Passes connections on to the runtime until it cuts them."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self.kill()

    def cut(self) -> None:
        """Resets the present connections."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def kill(self) -> None:
        """Acts as the runtime's SIGKILL: refuses later connections too."""
        assert self._server is not None
        self._server.close()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, upstream_writer]
        await asyncio.gather(_pump(reader, upstream_writer), _pump(upstream_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(reply=lambda *_: "x" * 400, step_s=0.002)


@pytest.fixture
async def served(tokenizer: Path, engine: FakeEngine):
    async with serving(tokenizer, engine=engine, token_sha256=token_sha256(TOKEN)) as runtime:
        yield runtime


@pytest.fixture
async def here(served: Served):
    async with world() as made:
        made.base(coldStart={"maxWait": "5s"})
        made.adapter("route")
        made.replica(served.url)
        await made.post(made.ask("route", max_tokens=1))
        yield made


def counted(here: World, kind: str = "completion") -> float:
    return here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type=kind)


def finished(served: Served) -> list[RequestRecord]:
    runtime = served.runtime
    page = UsagePage.model_validate_json(runtime.accounting.journal.page(runtime.boot_id, 0, 0))
    return [record for record in page.records if isinstance(record, RequestRecord)]


def streamed(text: str) -> int:
    """Characters, which are tokens, that a client has received."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return sum(len(event["choices"][0]["delta"].get("content", "")) for event in events if "choices" in event)


def agree(here: World, served: Served) -> None:
    """The gateway's metrics, the runtime's ring and its report for the operator show the same sums."""
    report = served.runtime.snapshot().adapter(*key_of("route"))
    assert report is not None
    requests = finished(served)
    assert sum(item.completion_tokens for item in requests) == counted(here) == report.usage.completion_tokens
    assert sum(item.prompt_tokens for item in requests) == counted(here, "prompt") == report.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_counts_agree_when_a_client_leaves_at_any_moment(
    here: World, served: Served, engine: FakeEngine, stream: bool
) -> None:
    for moment in MOMENTS:
        begin = engine.tokens_made
        asking = asyncio.create_task(here.post(here.ask("route", stream=stream, max_tokens=300)))
        await until(lambda begin=begin, moment=moment: engine.tokens_made >= begin + moment)
        asking.cancel()
        await until(lambda: here.gateway.in_flight == 0)
        assert finished(served)[-1].outcome is Ended.CANCELLED
        agree(here, served)


@pytest.mark.parametrize("stream", [False, True])
async def test_counts_agree_when_the_connection_between_them_is_cut_at_any_moment(
    here: World, served: Served, engine: FakeEngine, stream: bool
) -> None:
    async with Proxy(served.url).running() as proxy:
        here.gone()
        here.replica(proxy.url)
        for moment in MOMENTS:
            begin = engine.tokens_made
            asking = asyncio.create_task(here.post(here.ask("route", stream=stream, max_tokens=300)))
            await until(lambda begin=begin, moment=moment: engine.tokens_made >= begin + moment)
            proxy.cut()
            text = await (await asking).text()
            assert "upstream_lost" in text
            await until(lambda: here.gateway.in_flight == 0)
            assert streamed(text) <= finished(served)[-1].completion_tokens
            agree(here, served)
    assert len(finished(served)) == len(MOMENTS) + 1


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_gateway_counts_what_its_client_received_of_a_runtime_that_is_killed(
    here: World, served: Served, engine: FakeEngine, moment: int
) -> None:
    async with Proxy(served.url).running() as proxy:
        here.gone()
        here.replica(proxy.url)
        begin, before = engine.tokens_made, counted(here)
        asking = asyncio.create_task(here.post(here.ask("route", stream=True, max_tokens=300)))
        await until(lambda: engine.tokens_made >= begin + moment)
        proxy.kill()
        text = await (await asking).text()
        await until(lambda: here.gateway.in_flight == 0 and len(finished(served)) == 2)
        assert counted(here) - before == streamed(text) <= finished(served)[-1].completion_tokens


async def test_a_gateway_counts_what_it_was_sent_of_a_whole_answer_of_a_runtime_that_is_killed(
    here: World, served: Served, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "REPORT_INTERVAL_S", 0.0)
    async with Proxy(served.url).running() as proxy:
        here.gone()
        here.replica(proxy.url)
        begin, before = engine.tokens_made, counted(here)
        asking = asyncio.create_task(here.post(here.ask("route", max_tokens=300)))
        await until(lambda: engine.tokens_made >= begin + 100)
        proxy.kill()
        assert (await asking).status == 503
        await until(lambda: here.gateway.in_flight == 0 and len(finished(served)) == 2)
        assert 90 <= counted(here) - before <= finished(served)[-1].completion_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_counts_agree_when_the_engine_fails_mid_answer(
    here: World, served: Served, engine: FakeEngine, stream: bool
) -> None:
    engine.fail_after = 7
    text = await (await here.post(here.ask("route", stream=stream, max_tokens=300))).text()
    assert "the device is on fire" in text
    await until(lambda: here.gateway.in_flight == 0)
    assert (finished(served)[-1].outcome, finished(served)[-1].completion_tokens) == (Ended.FAILED, 7)
    agree(here, served)


async def test_an_engine_that_fails_before_the_first_token_of_a_stream_is_an_ordinary_error(
    here: World, engine: FakeEngine
) -> None:
    engine.fail_after = 0
    response = await here.post(here.ask("route", stream=True))
    assert (response.status, response.content_type) == (500, "application/json")
    assert "the device is on fire" in await response.text()


async def test_tokens_that_complete_no_text_are_reported_with_each_step(
    here: World, served: Served, engine: FakeEngine
) -> None:
    engine.reply = lambda *_: "é".encode()[:1] * 400  # never the end of a character
    async with Proxy(served.url).running() as proxy:
        here.gone()
        here.replica(proxy.url)
        begin, before = engine.tokens_made, counted(here)
        asking = asyncio.create_task(here.post(here.ask("route", stream=True, max_tokens=300)))
        await until(lambda: engine.tokens_made >= begin + 50)
        proxy.kill()
        await asking
        await until(lambda: here.gateway.in_flight == 0 and len(finished(served)) == 2)
    assert 40 <= counted(here) - before <= finished(served)[-1].completion_tokens


async def test_a_request_that_runs_is_part_of_the_report_before_it_ends(
    here: World, served: Served, engine: FakeEngine
) -> None:
    before = counted(here)
    asking = asyncio.create_task(here.post(here.ask("route", max_tokens=300)))
    begin = engine.tokens_made
    await until(lambda: engine.tokens_made >= begin + 30)
    report = served.runtime.snapshot().adapter(*key_of("route"))
    assert report is not None
    assert 20 <= report.usage.completion_tokens - before <= 300
    await asking
    agree(here, served)


async def test_usage_is_read_by_those_who_have_the_token_alone(here: World, served: Served) -> None:
    await here.post(here.ask("tiny", max_tokens=2), headers={"x-request-id": "mine"})

    async def read(token: str, after: int) -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{served.url}/v1/usage?after={after}") as response,
        ):
            return response.status, await response.json()

    assert (await read("wrong", 0))[0] == 401
    answer = UsagePage.model_validate((await read(TOKEN, 0))[1])
    requests = [record for record in answer.records if isinstance(record, RequestRecord)]
    key = key_of("route")
    assert [(item.uid, item.digest) for item in requests] == [(key.uid, key.digest), ("", "")]
    assert (requests[1].request_id, requests[1].completion_tokens) == ("mine", 2)
    last = answer.records[-1].seq
    assert (await read(TOKEN, last))[1]["records"] == []
