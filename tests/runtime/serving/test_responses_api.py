"""`/v1/responses` with the unmodified client: text, calls, schemas, streams, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import openai
import pytest
from fakes_runtime import Served
from pydantic import BaseModel

from lorapool_api.openai import InvalidRequestError
from lorapool_api.protocol import Usage
from lorapool_runtime.engines.interface import FinishReason
from lorapool_runtime.openai.reasoning import ReasoningStart
from lorapool_runtime.openai.response import Delta, ResponseHead
from lorapool_runtime.openai.responses_answer import ResponsesBuilder
from lorapool_runtime.openai.responses_request import parse_responses

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Wien"}}</tool_call>'


class Person(BaseModel):
    name: str
    age: int


def says(served: Served, text: str) -> None:
    served.engine.reply = lambda *_: text


def prompt_of(served: Served) -> str:
    return bytes(token for token in served.engine.requests[-1].prompt_ids if token < 256).decode()


async def test_text_is_answered_with_usage_and_is_not_stored(client: openai.AsyncOpenAI, served: Served) -> None:
    answer = await client.responses.create(
        model="tiny", input="hi", instructions="Be brief.", store=True, metadata={"a": "b"}, temperature=0
    )
    assert (answer.output_text, answer.status, answer.object) == ("I am base.", "completed", "response")
    assert (answer.store, answer.metadata, answer.temperature) == (False, {"a": "b"}, 0)
    assert answer.id.startswith("resp_")
    assert answer.usage is not None
    assert answer.usage.output_tokens == len("I am base.") + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert prompt_of(served) == "system\nBe brief.\nuser\nhi\nassistant\n"


async def test_a_stream_has_the_events_in_order_and_ends_with_the_whole_response(client: openai.AsyncOpenAI) -> None:
    events = [event async for event in await client.responses.create(model="tiny", input="hi", stream=True)]
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "I am base."
    last: Any = events[-1]
    assert last.response.output_text == "I am base."
    assert last.response.usage.output_tokens == len("I am base.") + 1


async def test_the_clients_own_stream_helper_assembles_the_answer(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, f"I look. {CALL}")
    async with client.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
        final = await stream.get_final_response()
    message, call = final.output
    assert (message.type, call.type) == ("message", "function_call")
    assert final.output_text == "I look. "
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "Wien"}


async def test_arguments_stream_as_they_are_generated(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, CALL)
    stream = await client.responses.create(
        model="tiny", input="hi", tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"}, stream=True
    )
    events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 10
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == '{"city": "Wien"}'
    assert {event.type for event in events} & {"response.content_part.added", "response.output_text.delta"} == set()


async def test_a_call_and_its_output_are_sent_back_as_one_turn(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, CALL)
    first = await client.responses.create(model="tiny", input="hi", tools=[WEATHER], tool_choice="required")
    [call] = first.output
    history: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    says(served, "Sunny.")
    second = await client.responses.create(model="tiny", input=history, tools=[WEATHER])
    assert second.output_text == "Sunny."
    assert f"assistant\nI look.\n{CALL}" in prompt_of(served)
    assert "sunny" in prompt_of(served)


async def test_a_schema_is_enforced_and_parsed(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, '{"name": "Bob", "age": 5}')
    answer = await client.responses.parse(model="tiny", input="Bob is 5", text_format=Person)
    assert answer.output_parsed == Person(name="Bob", age=5)
    assert served.engine.requests[-1].grammar is not None


async def test_an_answer_that_is_cut_off_is_incomplete(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="tiny", input="hi", max_output_tokens=4)
    assert (whole.status, whole.output_text) == ("incomplete", "I am")
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = [
        event
        async for event in await client.responses.create(model="tiny", input="hi", max_output_tokens=4, stream=True)
    ]
    assert events[-1].type == "response.incomplete"


async def test_logprobs_are_part_of_the_text(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(
        model="tiny", input="hi", include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=3
    )
    part: Any = answer.output[0].content[0]  # type: ignore[union-attr]
    assert [entry.token for entry in part.logprobs] == ["I", " ", "a"]
    assert len(part.logprobs[0].top_logprobs) == 2


async def test_an_engine_error_ends_the_stream_with_an_error_for_the_client(
    client: openai.AsyncOpenAI, served: Served
) -> None:
    served.engine.fail_after = 3
    with pytest.raises(openai.APIError, match="on fire"):
        async for _ in await client.responses.create(model="tiny", input="hi", stream=True):
            pass


async def test_an_empty_answer_is_one_empty_message(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, "")
    answer = await client.responses.create(model="tiny", input="hi")
    assert [item.type for item in answer.output] == ["message"]
    assert answer.output_text == ""


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "non-empty"),
    ({"input": []}, "input", "non-empty"),
    ({"input": [7]}, "input[0]", "object"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "one of"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "text"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "store: false"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type", "function_call"),
    ({"input": [{"type": "function_call_output", "call_id": 7, "output": "x"}]}, "input[0].call_id", "id of the call"),
    ({"input": "x" * 5000}, "input", "4096"),
    ({"input": "refuse me"}, "input", "alternate"),
    ({"instructions": 7}, "instructions", "string"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
    ({"conversation": "c"}, "conversation", "whole conversation"),
    ({"background": True}, "background", "not supported"),
    ({"truncation": "auto"}, "truncation", "shorten"),
    ({"include": ["file_search_call.results"]}, "include", "logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"messages": []}, "messages", "/v1/responses"),
    ({"invented": 1}, "invented", "Unknown"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "other tools"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", ""),
    ({"tools": [{**WEATHER, "parameters": {"properties": {"a": {"not": {}}}}}]}, "tools[0].parameters", "a.not"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "object"),
    ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
    ({"text": {"invented": 1}}, "text.invented", "Unknown"),
    ({"temperature": 3}, "temperature", "2"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: str(value)[:50])
async def test_what_is_refused_is_named_as_this_api_names_it(
    served: Served, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "tiny", "input": "hi", **fields}
    async with aiohttp.ClientSession(served.url) as http, http.post("/v1/responses", json=body) as response:
        answer = await response.json()
    assert response.status == 400, answer
    assert answer["error"]["param"] == param, answer
    assert words in answer["error"]["message"], answer
    assert f"`{param}" in answer["error"]["message"] or param == "input", answer


async def test_keywords_that_are_not_enforced_are_reported_by_the_names_of_this_api(
    served: Served,
) -> None:
    loose = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    body = {"model": "tiny", "input": "hi", "tools": [loose]}
    async with aiohttp.ClientSession(served.url) as http, http.post("/v1/responses", json=body) as response:
        assert response.headers["x-lorapool-relaxed"] == "tools[0].parameters.properties.a.not"


def test_several_calls_of_one_turn_become_one_message() -> None:
    calls = [{"type": "function_call", "call_id": f"c{i}", "name": "f", "arguments": "{}"} for i in range(2)]
    outputs = [{"type": "function_call_output", "call_id": f"c{i}", "output": "r"} for i in range(2)]
    body = {"model": "m", "input": [{"role": "user", "content": "x"}, *calls, *outputs]}
    parsed = parse_responses(json.dumps(body).encode())
    assert [message["role"] for message in parsed.messages] == ["user", "assistant", "tool", "tool"]
    assert len(parsed.messages[1]["tool_calls"]) == 2


def test_a_call_whose_arguments_are_wrong_is_named_by_its_item() -> None:
    body = {"model": "m", "input": [{"type": "function_call", "call_id": "c", "name": 7, "arguments": "{}"}]}
    with pytest.raises(InvalidRequestError) as caught:
        parse_responses(json.dumps(body).encode())
    assert caught.value.param == "input[0].name"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning_is_an_item_of_its_own_and_no_text(size: int) -> None:
    head = ResponseHead(chat=True, model="m", created_unix_s=1, fingerprint="f")
    builder = ResponsesBuilder(head, {}, None, ReasoningStart.MAYBE, str, lambda token: [])
    usage, text = Usage(prompt_tokens=1, completion_tokens=9), "<think>hm</think>Hi."
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    deltas = [Delta(0, piece, (), usage) for piece in pieces] + [Delta(0, "", (), usage, FinishReason.STOP)]
    events = [json.loads(event.split(b"data: ", 1)[1]) for delta in deltas for event in builder.chunks(delta)]
    for kind, wanted in (("response.reasoning_text.delta", "hm"), ("response.output_text.delta", "Hi.")):
        assert "".join(event["delta"] for event in events if event["type"] == kind) == wanted
    reasoning, message = builder.body(usage)["output"]
    assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "hm"}])
    assert message["content"][0]["text"] == "Hi."
