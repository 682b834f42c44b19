"""Fields of other servers' clients: what asks for nothing passes, what asks for something is refused by name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from fakes_runtime import Served, serving

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def served(byte_tokenizer: Path) -> AsyncIterator[Served]:
    async with serving(byte_tokenizer) as running:
        yield running


async def status(served: Served, **fields: Any) -> int:
    body = {"model": "tiny", "messages": HI, "max_tokens": 8, **fields}
    async with aiohttp.ClientSession(served.url) as http, http.post("/v1/chat/completions", json=body) as response:
        return response.status


HARMLESS: list[dict[str, Any]] = [
    {"stop_token_ids": None}, {"prompt_logprobs": None}, {"documents": None}, {"min_tokens": 0}, {"stop": ""},
    {"skip_special_tokens": True}, {"include_stop_str_in_output": False}, {"add_special_tokens": None},
    {"use_beam_search": False}, {"length_penalty": 1.0}, {"extra_body": {}}, {"parallelToolCalls": False},
    {"max_tokens": 8.0}, {"top_k": 40.0}, {"n": 1.0}, {"seed": 3.0}, {"store": True}, {"store": False},
    {"verbosity": "medium"}, {"prompt_cache_retention": "24h"}, {"service_tier": "flex"}, {"user": "u"},
    {"metadata": {"a": "b"}}, {"stream_options": {}}, {"stream_options": None}, {"invented": None}, {"invented": ""},
    {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False, "invented": False}},
]  # fmt: skip


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
async def test_null_neutral_and_integral_values_pass(served: Served, fields: dict[str, Any]) -> None:
    assert await status(served, **fields) == 200


@pytest.mark.parametrize(
    "fields",
    [{"invented": 1}, {"invented": True}, {"length_penalty": 1.5}, {"best_of": 2}],
    ids=str,
)
async def test_a_field_that_asks_for_something_unknown_is_refused(served: Served, fields: dict[str, Any]) -> None:
    assert await status(served, **fields) == 400


@pytest.mark.parametrize("above", [1, 100_000])
async def test_max_tokens_above_the_room_left_is_a_cap(client: openai.AsyncOpenAI, served: Served, above: int) -> None:
    short = await client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
    assert short.usage is not None
    room = 512 - short.usage.prompt_tokens
    for wanted in (room, room + above):
        await client.chat.completions.create(model="tiny", messages=HI, max_tokens=wanted)
        assert served.engine.requests[-1].sampling.max_tokens == room
    await client.completions.create(model="tiny", prompt="x" * 510, max_tokens=2 + above)
    assert served.engine.requests[-1].sampling.max_tokens == 2


async def test_continuous_usage_stats_report_the_usage_in_every_chunk(client: openai.AsyncOpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert len(counts) > len("I am base.")
    assert counts == sorted(counts)
    assert counts[-1] == len("I am base.") + 1
    quiet: Any = {"include_usage": False, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True, stream_options=quiet)
    assert {chunk.usage async for chunk in stream} == {None}
