"""The gateway in front of the true runtime's server (its engine is a fake): both ends of the protocol agree."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from fakes import digest_of
from fakes_runtime import FakeEngine, FakeStore, Served, save_byte_tokenizer, serving, source_error
from gateway_world import KEY, World, key_of, until, world

from lorapool_api.common import FailureReason
from lorapool_api.protocol import token_sha256
from lorapool_gateway.routing.runtime_polls import PolledPod, RuntimePolls

USER: list[Any] = [{"role": "user", "content": "who are you"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def served(tokenizer: Path):
    async with serving(tokenizer, token_sha256=token_sha256("t" * 64), pod_uid="pod") as runtime:
        yield runtime


@pytest.fixture
async def here(served: Served):
    async with world() as made:
        made.base(coldStart={"maxWait": "5s"})
        made.adapter("route")
        made.replica(served.url)
        yield made


async def test_a_cold_adapter_is_registered_loaded_answered_and_warm_the_second_time(
    here: World, served: Served
) -> None:
    async with here.client() as client:
        cold = await client.chat.completions.with_raw_response.create(model="route", messages=USER)
        warm = await client.chat.completions.with_raw_response.create(model="route", messages=USER)
    assert cold.parse().choices[0].message.content == "I am route."
    assert cold.headers["x-lorapool-adapter"] == f"demo/route@{digest_of('route')}"
    assert int(cold.headers["x-lorapool-cold-start-ms"]) >= 0
    assert "x-lorapool-cold-start-ms" not in warm.headers
    assert served.store.fetches == {"hf://org/route": 1}


async def test_streams_and_whole_answers_count_the_same_tokens_as_the_runtime(here: World, served: Served) -> None:
    async with here.client() as client:
        whole = await client.chat.completions.create(model="route", messages=USER)
        stream = await client.chat.completions.create(
            model="route", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        base = await client.completions.create(model="demo/tiny", prompt="x")
    assert whole.usage is not None
    assert chunks[-1].usage == whole.usage
    assert base.choices[0].text == "I am base."
    for kind, tokens in (("prompt", whole.usage.prompt_tokens), ("completion", whole.usage.completion_tokens)):
        counted = here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type=kind)
        assert counted == 2 * tokens
    report = served.runtime.snapshot().adapter(*key_of("route"))
    assert report is not None
    assert report.usage.completion_tokens == 2 * whole.usage.completion_tokens


async def test_echoes_choices_and_tools_pass_through_and_are_counted(here: World, served: Served) -> None:
    def counted() -> tuple[float, float]:
        kinds = ("prompt", "completion")
        return tuple(here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type=kind) for kind in kinds)

    echo: dict[str, Any] = {
        "model": "route", "prompt": ["Once", "upon a time"], "echo": True, "logprobs": 1, "max_tokens": 0,
    }  # fmt: skip
    async with here.client() as client:
        whole = await client.completions.create(**echo)
        assert [choice.text for choice in whole.choices] == ["Once", "upon a time"]
        assert whole.choices[0].logprobs.token_logprobs == [None, -0.125, -0.125, -0.125]
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (15, 0)
        assert counted() == (15, 0)
        events = [chunk async for chunk in await client.completions.create(**echo, stream=True)]
        assert sorted((event.choices[0].index, event.choices[0].text) for event in events) == [
            (0, "Once"), (1, "upon a time"),
        ]  # fmt: skip
        assert counted() == (30, 0)
        many = await client.completions.create(model="route", prompt="x", n=3, max_tokens=5)
        assert len(many.choices) == 3
        assert counted() == (31, 15)
        served.engine.reply = lambda *_: '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
        tools: Any = [{"type": "function", "function": {"name": "now"}}]
        called = await client.chat.completions.create(model="route", messages=USER, tools=tools, max_tokens=60)
        assert called.choices[0].finish_reason == "tool_calls"
        assert called.choices[0].message.tool_calls[0].function.name == "now"
        assert counted()[1] == 15 + called.usage.completion_tokens


async def test_a_hundred_requests_on_one_cold_adapter_fetch_it_once(tokenizer: Path) -> None:
    store = FakeStore(delay_s=0.1)
    async with serving(tokenizer, store=store, token_sha256=token_sha256("t" * 64)) as served, world() as here:
        here.base()
        here.adapter("route")
        here.replica(served.url)
        answers = await asyncio.gather(*(here.post(here.ask("route")) for _ in range(100)))
    assert {answer.status for answer in answers} == {200}
    assert store.fetches == {"hf://org/route": 1}


async def test_a_source_that_fails_while_loading_becomes_the_matching_error(here: World, served: Served) -> None:
    served.store.errors["hf://org/route"] = [source_error(FailureReason.CORRUPT_ARTIFACT, "truncated")]
    async with here.client() as client:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await client.chat.completions.create(model="route", messages=USER)
    assert caught.value.code == "corrupt_artifact"


@pytest.mark.parametrize(("field", "value"), [("temperature", -1), ("n", 9), ("top_k", -2)])
async def test_the_runtime_names_the_field_that_is_out_of_bounds(here: World, field: str, value: int) -> None:
    response = await here.post(here.ask("route", **{field: value}))
    error = (await response.json())["error"]
    assert (response.status, error["type"]) == (400, "invalid_request_error")
    assert field in error["message"]


async def test_a_client_that_leaves_ends_the_generation_in_the_engine(tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.01)
    async with serving(tokenizer, engine=engine, token_sha256=token_sha256("t" * 64)) as served, world() as here:
        here.base()
        here.adapter("route")
        here.replica(served.url)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with aiohttp.ClientSession() as session:
            body = here.ask("route", stream=True, max_tokens=300)
            async with session.post(f"{here.url}/v1/chat/completions", json=body, headers=headers) as response:
                for _ in range(5):
                    await response.content.readuntil(b"\n\n")
                response.close()
        await until(lambda: served.runtime.snapshot().in_flight == 0)
        await until(lambda: here.gateway.in_flight == 0)
        made = engine.tokens_made
        await asyncio.sleep(0.1)
        assert engine.tokens_made == made < 100
        counted = here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type="completion")
        assert made - 3 <= counted <= made


@pytest.mark.parametrize("stream", [False, True])
async def test_gateway_and_runtime_count_the_same_for_a_client_that_leaves(tokenizer: Path, stream: bool) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.01)
    async with serving(tokenizer, engine=engine, token_sha256=token_sha256("t" * 64)) as served, world() as here:
        here.base()
        here.adapter("route")
        here.replica(served.url)
        asking = asyncio.create_task(here.post(here.ask("route", stream=stream, max_tokens=300)))
        await until(lambda: engine.tokens_made >= 5)
        asking.cancel()
        await until(lambda: here.gateway.in_flight == 0)
        report = served.runtime.snapshot().adapter(*key_of("route"))
        assert report is not None
        assert report.usage.cancelled_requests == 1
        assert report.usage.completion_tokens == engine.tokens_made < 100
        for kind, tokens in (("prompt", report.usage.prompt_tokens), ("completion", report.usage.completion_tokens)):
            assert tokens > 0
            assert here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type=kind) == tokens


async def test_an_attempt_that_has_ended_or_never_was_cannot_be_cancelled(served: Served) -> None:
    headers = {"Authorization": f"Bearer {'t' * 64}"}
    url = f"{served.url}/v1/attempts/unknown"
    async with aiohttp.ClientSession(headers=headers) as session, session.delete(url) as response:
        assert response.status == 404


async def test_the_long_poll_sees_a_load_and_the_end_of_the_runtime(here: World, served: Served) -> None:
    changes = asyncio.Event()
    async with aiohttp.ClientSession() as session:
        polls = RuntimePolls(session, lambda uid: ("t" * 64,), changes.set)
        polls.follow({"pod": PolledPod(served.url, "base-demo-tiny")})
        await until(lambda: "pod" in polls.states)
        assert polls.states["pod"].ready
        await here.post(here.ask("route"))
        await until(lambda: tuple(key_of("route")) in polls.states["pod"].loaded)
        await polls.close()


async def test_a_runtime_that_drains_takes_nothing_and_the_request_goes_elsewhere(
    here: World, served: Served, tokenizer: Path
) -> None:
    here.gone()
    async with serving(tokenizer, token_sha256=token_sha256("t" * 64)) as other:
        served.runtime.draining = True  # what its SIGTERM does; the gateway has not noticed yet
        here.replica(served.url, "pod-a")
        here.replica(other.url, "pod-b")
        answers = [await here.post(here.ask("demo/tiny")) for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4
