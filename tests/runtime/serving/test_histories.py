"""Conversations that other servers, SDKs and user interfaces kept are accepted, and reach the template as they mean."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import FakeEngine, Served, save_byte_tokenizer, serving

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.openai.messages import UNPARSED
from lorapool_runtime.openai.request import parse_chat

SHOWS_ALL = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
USER = {"role": "user", "content": "Say hello."}


def call(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def parsed(*messages: dict[str, Any]) -> list[Any]:
    return list(parse_chat(json.dumps({"model": "m", "messages": [USER, *messages]}).encode()).messages[1:])


def arguments_of(given: Any) -> Any:
    (message,) = parsed({"role": "assistant", "content": None, "tool_calls": [call(given)]})
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ('{"a": "cut off', {UNPARSED: '{"a": "cut off'}),
        ("null", {UNPARSED: "null"}),
        ("[1]", {UNPARSED: "[1]"}),
        ([1], {UNPARSED: "[1]"}),
        (5, {UNPARSED: "5"}),
        (True, {UNPARSED: "true"}),
        ('{"a": NaN}', {UNPARSED: '{"a": NaN}'}),
        ('{"a": "\\ud83d"}', {UNPARSED: '{"a": "\\ud83d"}'}),
        ("[" * 5000, {UNPARSED: "[" * 5000}),
    ],
    ids=lambda value: str(value)[:16],
)
def test_arguments_are_an_object_for_the_template_whatever_was_kept_of_them(given: Any, taken: Any) -> None:
    assert arguments_of(given) == taken


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_details": [{"type": "x"}]},
        {"id": "m1", "annotations": [], "audio": None, "timestamp": 5, "provider_specific_fields": {"a": 1}},
        {"refusal": None, "function_call": None, "tool_calls": None},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_fields_that_change_nothing_of_what_was_said_have_no_effect(extra: dict[str, Any]) -> None:
    assert parsed({"role": "assistant", "content": "Hello", **extra}) == [{"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_given_to_the_template_under_the_name_that_it_reads(name: str) -> None:
    assert parsed({"role": "assistant", "content": "Hello", name: "hm"})[0]["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant", "content": []}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": None, "refusal": "I will not."}, "I will not."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "A"}]}, "A"),
        ({"role": "user", "content": []}, ""),
        ({"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}, "ab"),
        ({"role": "tool", "tool_call_id": "c1", "content": None}, ""),
        ({"role": "tool", "tool_call_id": "c1", "content": []}, ""),
        ({"role": "tool", "content": "no id"}, "no id"),
        ({"role": "function", "name": "f", "content": "older"}, "older"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_empty_and_divided_contents_are_text(message: dict[str, Any], content: str) -> None:
    (found,) = parsed(message)
    assert found["content"] == content


def test_calls_of_other_servers_are_calls() -> None:
    many = [{**call(), "id": f"c{i}"} for i in range(17)]
    bare = {"function": {"name": "srv.f/x"}, "extra_content": {"g": 1}}
    (first, second, third) = parsed(
        {"role": "assistant", "content": None, "tool_calls": many},
        {"role": "assistant", "tool_calls": [bare]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
    )
    assert len(first["tool_calls"]) == 17
    assert second["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "srv.f/x", "arguments": {}}}
    ]
    assert third["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": {"text": "x"}}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "messages[1].content[0]"),
        ({"role": ["user"], "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": "x", "images": ["aGk="]}, "messages[1].images"),
        ({"role": "assistant", "content": "x", "prefix": True}, "messages[1].prefix"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}, "messages[1].tool_calls[0].function.name"),
        ({"role": "tool", "content": "x", "tool_call_id": 7}, "messages[1].tool_call_id"),
        ({"role": "assistant", "content": "x", "reasoning": "\ud800"}, "messages[1].reasoning_content"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_what_cannot_be_read_is_refused_by_name(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parsed(message)
    assert caught.value.param == param


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    folder = save_byte_tokenizer(tmp_path, chat_template=SHOWS_ALL)
    async with serving(folder, engine=FakeEngine(max_model_len=4096)) as running:
        yield running


async def test_such_a_history_is_answered_and_never_with_a_server_error(served: Served) -> None:
    histories: list[list[Any]] = [
        [USER, {"role": "assistant", "content": None, "tool_calls": [call(given)]}, {"role": "tool", "content": "ok"}]
        for given in ({"a": 1}, [1], 5, True, "null", '{"a": "cut off', "")
    ]
    async with aiohttp.ClientSession(served.url) as http:
        for messages in histories:
            body = {"model": "tiny", "messages": messages, "max_tokens": 4}
            async with http.post("/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()


async def test_half_a_surrogate_pair_is_a_bad_request_wherever_it_is(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["\ud83d"]}}}
    bodies: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
        {"chat_template_kwargs": {"a": "\ud83d"}},
        {"messages": [{"role": "assistant", "tool_calls": [call({"a": "\ud83d"})]}]},
        {"messages": [{"role": "assistant", "tool_calls": [call({"\ud83d": "a"})]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "\ud83d", "function": {"name": "f"}}]}]},
    ]
    async with aiohttp.ClientSession(served.url) as http:
        for fields in bodies:
            async with http.post(
                "/v1/chat/completions", json={"model": "tiny", "messages": [USER], **fields}
            ) as response:
                assert response.status == 400, (fields, await response.text())
