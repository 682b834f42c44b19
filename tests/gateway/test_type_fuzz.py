"""Every field of every request with wrong types and nulls: no answer is a 5xx, and each 400 names the field.

The gateway is in front of the true server of a runtime, whose engine is a fake.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes_runtime import FakeEngine, save_byte_tokenizer, serving
from gateway_world import World, world

from lorapool_api.protocol import token_sha256

FEW, MANY = 400, 3000
CONCURRENT = 8
Path_ = tuple[str | int, ...]

WRONG: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**30, 1e308, "", "x", "\x00", [], [None], [[]], ["x"], [1.5], {},
    {"a": 1},
    {"type": "x"}, {"type": None}, [{"type": "text", "text": 1}],
]  # fmt: skip
FUNCTION = {
    "name": "f",
    "description": "d",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 1, "pattern": "^x", "enum": ["x"]}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
SAMPLING = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"65": 1}, "stop": ["y"], "user": "u",
    "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "min_tokens": 0, "ignore_eos": False,
}  # fmt: skip
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "max_tokens": 3,
    "max_completion_tokens": 3,
    "n": 1,
    "logprobs": True,
    "top_logprobs": 1,
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    **SAMPLING,
}
FORMAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 3,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "strict": False, "description": "d", "schema": FUNCTION["parameters"]},
    },
}
COMPLETION: dict[str, Any] = {
    "model": "tiny", "prompt": ["x", [1, 2]], "max_tokens": 3, "n": 1, "logprobs": 1, "echo": True, "stream": False,
    **SAMPLING,
}  # fmt: skip
RESPONSE: dict[str, Any] = {
    "model": "tiny",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "x"}'},
        {"type": "function_call_output", "call_id": "c", "output": "r"},
    ],
    "instructions": "s",
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": {"type": "function", "name": "f"},
    "parallel_tool_calls": False,
    "max_output_tokens": 3,
    "max_tool_calls": 3,
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 1,
    "reasoning": {"effort": None, "summary": None},
    "text": {"verbosity": "medium"},
    "truncation": "disabled",
    "background": False,
    "previous_response_id": None,
    "stream": False,
    **SAMPLING,
}
RESPONSE_FORMAT: dict[str, Any] = {
    "model": "tiny",
    "input": "hi",
    "max_output_tokens": 3,
    "text": {"format": {"type": "json_schema", "name": "x", "strict": False, "schema": FUNCTION["parameters"]}},
}
TOKENIZE: dict[str, Any] = {
    "model": "tiny",
    "messages": CHAT["messages"],
    "tools": CHAT["tools"],
    "add_special_tokens": False,
    "return_token_strs": True,
}
DETOKENIZE: dict[str, Any] = {"model": "tiny", "tokens": [1, 2]}
BODIES = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", FORMAT),
    ("/v1/completions", COMPLETION),
    ("/v1/responses", RESPONSE),
    ("/v1/responses", RESPONSE_FORMAT),
    ("/tokenize", TOKENIZE),
    ("/tokenize", {"model": "tiny", "prompt": "x", "add_special_tokens": True}),
    ("/detokenize", DETOKENIZE),
]
RELATED = {
    # a wrong value of the one makes the other one wrong
    "logprobs": {"top_logprobs"},
    "stream": {"stream_options"},
    "tools": {"tool_choice", "parallel_tool_calls", "min_tokens"},
    "tool_choice": {"tools"},
    "max_tokens": {"min_tokens", "prompt"},
    "max_completion_tokens": {"min_tokens"},
    "max_output_tokens": {"min_tokens"},
    "min_tokens": {"max_tokens"},
    "n": {"prompt", "max_tokens"},
    "prompt": {"n"},
    "echo": {"max_tokens"},
}


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    engine = FakeEngine(max_model_len=4096, step_s=0.0)
    folder = save_byte_tokenizer(tmp_path)
    async with (
        serving(folder, engine=engine, token_sha256=token_sha256("t" * 64), pod_uid="pod") as served,
        world() as made,
    ):
        made.base()
        made.replica(served.url)
        yield made


def paths(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The paths of all values within a body."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from paths(item, (*path, name))


def changed(body: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(body)
    holder: Any = made
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    return made


def mutations() -> list[tuple[str, dict[str, Any], Path_, Any]]:
    return [(route, body, path, value) for route, body in BODIES for path in paths(body) for value in WRONG]


async def refusal(here: World, route: str, body: dict[str, Any], path: Path_, value: Any) -> str | None:
    """What is wrong with the answer to a body with one wrong value; None for nothing."""
    response = await here.post(changed(body, path, value), path=route)
    text = await response.text()
    where = f"{route} {path} = {value!r}"
    if response.status >= 500:
        return f"{where}: {response.status} {text[:200]}"
    if response.status != 400:
        return None
    error = (await response.json())["error"]
    root = str(path[0])
    named = str(error["param"]).partition(".")[0].partition("[")[0]
    return None if named in {root, *RELATED.get(root, ())} else f"{where}: names {error['param']}: {error['message']}"


@pytest.mark.parametrize("bodies", [FEW, pytest.param(MANY, marks=pytest.mark.deep)])
async def test_no_wrong_type_is_a_5xx_and_every_400_names_its_field(here: World, bodies: int) -> None:
    every = mutations()
    assert len(every) >= MANY
    for route, body in BODIES:
        assert (await here.post(body, path=route)).status == 200, route
    chosen = random.Random(7).sample(every, bodies)
    wrong: list[str] = []
    for at in range(0, len(chosen), CONCURRENT):
        found = await asyncio.gather(*(refusal(here, *one) for one in chosen[at : at + CONCURRENT]))
        wrong += [line for line in found if line is not None]
    assert not wrong, "\n".join(wrong)
