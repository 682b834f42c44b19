"""Tools and response formats, in requests and responses, with the unmodified client and a scripted engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from fakes_runtime import Served, chat_of, save_byte_tokenizer, tokenizer_of

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.openai.request import parse_chat
from lorapool_runtime.openai.tools import tool_calls
from lorapool_runtime.openai.tools.tool_calls import JsonObjectScanner, ToolCallDelta, ToolCallReader
from lorapool_runtime.openai.tools.tool_choice import tools_grammar
from lorapool_runtime.openai.tools.tool_format import PLAIN, ToolFormat, infer_format, plain_messages

HI: list[Any] = [{"role": "user", "content": "hi"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Wien"}}</tool_call>'
SECOND = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def says(served: Served, text: str) -> None:
    served.engine.reply = lambda *_: text


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_call_becomes_tool_calls_and_no_content(
    client: openai.AsyncOpenAI, served: Served, choice: Any
) -> None:
    says(served, CALL)
    answer = await client.chat.completions.create(
        model="tiny", messages=HI, tools=[WEATHER, NOW], tool_choice=choice, max_tokens=200
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Wien"}
    assert call.id.startswith("call_")
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == "tool_calls"
    assert served.engine.requests[-1].grammar is not None


async def test_calls_within_text_stream_as_deltas_with_an_index(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, f"I look. {CALL}\n{SECOND}")
    stream = await client.chat.completions.create(
        model="tiny", messages=HI, tools=[WEATHER, NOW], stream=True, max_tokens=200, n=2
    )
    texts: dict[int, str] = {0: "", 1: ""}
    calls: dict[int, dict[int, list[str]]] = {0: {}, 1: {}}
    finish: dict[int, str] = {}
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.function.name is not None:
                calls[choice.index][call.index] = [call.function.name]
                assert (call.type, call.id[:5]) == ("function", "call_")
            calls[choice.index][call.index].append(call.function.arguments)
        finish[choice.index] = choice.finish_reason
    assert texts == {0: "I look. ", 1: "I look. "}
    joined = {index: (name, "".join(parts)) for index, (name, *parts) in calls[0].items()}
    assert joined == {0: ("get_weather", '{"city": "Wien"}'), 1: ("now", "{}")}
    assert len(calls[0][0]) > 10  # one part for each token, not one for the whole call
    assert calls[0] == calls[1]
    assert finish == {0: "tool_calls", 1: "tool_calls"}


async def test_without_a_call_the_answer_is_text_and_a_call_that_is_cut_off_stays_a_call(
    client: openai.AsyncOpenAI, served: Served
) -> None:
    says(served, "a < b, <tool> and <tool_c")
    answer = await client.chat.completions.create(model="tiny", messages=HI, tools=[NOW], max_tokens=200)
    assert answer.choices[0].message.content == "a < b, <tool> and <tool_c"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    says(served, CALL)
    nameless = await client.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER], max_tokens=30)
    assert (nameless.choices[0].message.content, nameless.choices[0].finish_reason) == (CALL[:30], "length")
    cut = await client.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER], max_tokens=60)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (None, "length")
    assert cut.choices[0].message.tool_calls[0].function.arguments == CALL[:60].partition('"arguments": ')[2]


async def test_tool_choice_none_leaves_the_tools_out_of_the_prompt(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, CALL)
    answer = await client.chat.completions.create(
        model="tiny", messages=HI, tools=[WEATHER], tool_choice="none", max_tokens=200
    )
    assert answer.choices[0].message.content == CALL
    assert served.engine.requests[-1].grammar is None
    assert b"get_weather" not in bytes(token for token in served.engine.requests[-1].prompt_ids if token < 256)


async def test_earlier_calls_and_their_results_are_part_of_the_conversation(
    client: openai.AsyncOpenAI, served: Served
) -> None:
    says(served, "Sunny.")
    earlier: list[Any] = [
        *HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Wien"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 30 degrees"},
    ]
    await client.chat.completions.create(model="tiny", messages=earlier, tools=[WEATHER], max_tokens=20)
    prompt = bytes(token for token in served.engine.requests[-1].prompt_ids if token < 256).decode()
    assert CALL in prompt
    assert "sunny, 30 degrees" in prompt
    assert '"description": "The weather of a city."' in prompt


@pytest.mark.parametrize(
    ("choice", "answers"),
    [("auto", {'{"a": 1}': True, SECOND: True, "text": False}), ("required", {'{"a": 1}': False, SECOND: True})],
)
async def test_with_tools_and_a_schema_an_answer_is_calls_or_follows_the_schema(
    client: openai.AsyncOpenAI, served: Served, choice: Any, answers: dict[str, bool]
) -> None:
    shape = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    for text, permitted in answers.items():
        says(served, text)
        answer = await client.chat.completions.create(
            model="tiny", messages=HI, tools=[NOW], tool_choice=choice, max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": shape}},
        )  # fmt: skip
        assert bool(answer.choices[0].message.tool_calls) is (text == SECOND)
        grammar = served.engine.requests[-1].grammar
        assert grammar is not None
        mask = grammar.constraint().mask()
        assert bool(mask[ord(text[0]) // 8] & 1 << ord(text[0]) % 8) is permitted


async def test_every_choice_has_a_grammar_state_of_its_own(client: openai.AsyncOpenAI, served: Served) -> None:
    await client.chat.completions.create(
        model="tiny", messages=HI, n=3, response_format={"type": "json_object"}, max_tokens=10
    )
    first, second, third = (request.grammar for request in served.engine.requests)
    assert first is not None
    assert first is second is third
    constraints = [first.constraint() for _ in range(2)]
    constraints[0].accept(ord("{"))
    assert constraints[0].mask() != constraints[1].mask()


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": value}}}


def deep(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        made = {"allOf": [{"anyOf": [made, {"type": "integer"}]}, {"anyOf": [made, {"type": "null"}]}]}
    return made


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


SCHEMA = "response_format.json_schema.schema"
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": "json"}, "response_format", "object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format", "json_object"),
    (schema(None), SCHEMA, "object"),
    (schema({"type": "strin"}), SCHEMA, "strin"),
    (schema({"not": {"type": "string"}}), SCHEMA, "not"),
    (schema({"type": "array", "uniqueItems": True}), SCHEMA, "uniqueItems"),
    (schema({"$ref": "https://example.com/x.json"}), SCHEMA, "#/"),
    (schema({"type": "object", "x-guidance": {"lenient": True}}), SCHEMA, "x-guidance"),
    (schema(deep(5)), SCHEMA, "1024 alternatives"),
    (schema({"enum": [f"v{i}" for i in range(6000)]}), SCHEMA, "5000 parts"),
    (schema({"const": "y" * 70_000}), SCHEMA, "65536 bytes"),
    (schema({"type": "string", "pattern": "(a|b)" * 300}), SCHEMA, "1000 characters"),
    (schema({"type": "string", "pattern": "("}), SCHEMA, "unclosed group"),
    (schema({"type": "string", "pattern": "^(?!-)[a-z]+$"}), SCHEMA, "look-around"),
    ({**schema({"type": "object"}), "ignore_eos": True}, "ignore_eos", "response_format"),
    ({"tools": [NOW], "ignore_eos": True}, "ignore_eos", "tools"),
    ({"tools": [NOW] * 65}, "tools", "64"),
    ({"tools": [NOW, NOW]}, "tools", "more than once"),
    ({"tools": [{"type": "function"}]}, "tools[0]", "function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "not supported"),
    (tool(name="a b"), "tools[0].function.name", "128"),
    (tool(parameters=[]), "tools[0].function.parameters", "object"),
    (
        tool(parameters={"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, strict=True),
        "tools[0].function.parameters",
        "not",
    ),
    (tool(parameters={"type": "array"}), "tools[0].function.parameters", "object"),
    (tool(strict="yes"), "tools[0].function.strict", "true or false"),
    (tool(extra=1), "tools[0].function.extra", "Unknown"),
    ({"tool_choice": "auto"}, "tool_choice", "tools"),
    ({"tools": [NOW], "tool_choice": "sometimes"}, "tool_choice", "required"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "now"),
    ({"tools": [NOW], "parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 1}]}, "messages[0].tool_call_id", "call"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0]", "function"),
]


async def test_an_unsupported_schema_or_tool_is_refused_by_name_and_bound(served: Served) -> None:
    async with aiohttp.ClientSession(served.url) as http:
        for fields, param, words in BAD:
            async with http.post("/v1/chat/completions", json={"model": "tiny", "messages": HI, **fields}) as response:
                body = await response.json()
            assert response.status == 400, (fields, body)
            assert body["error"]["param"] == param, body
            assert words in body["error"]["message"], body
    assert served.engine.requests == []


# --- reading calls --------------------------------------------------------------------------


def read_in_pieces(text: str, size: int) -> tuple[str, list[list[str]], list[int]]:
    """The text around the calls, [name, arguments] of each, and how many pieces the arguments of each had."""
    reader = ToolCallReader(PLAIN)
    parts = [part for at in range(0, len(text), size) for part in reader.push(text[at : at + size])] + reader.finish()
    calls: list[list[str]] = []
    pieces: list[int] = []
    for part in parts:
        if isinstance(part, ToolCallDelta):
            if part.name is not None:
                calls.append([part.name, ""])
                pieces.append(0)
            calls[part.index][1] += part.arguments
            pieces[part.index] += bool(part.arguments)
    return "".join(part for part in parts if isinstance(part, str)), calls, pieces


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_read_the_same_however_the_text_is_split(size: int) -> None:
    tricky = CALL.replace("Wien", 'W\\"}\\\\').replace('"arguments": {', '"arguments": {"a": [{}, "]"], ')
    text = f'x <tool_call>no</tool_call> <tool_call>{{"name": "f", "arguments": 7 {CALL}\n {SECOND}\n{tricky}'
    joined, calls, _ = read_in_pieces(text, size)
    assert calls == [
        ["get_weather", '{"city": "Wien"}'],
        ["now", "{}"],
        ["get_weather", '{"a": [{}, "]"], "city": "W\\"}\\\\"}'],
    ]
    assert joined == 'x <tool_call>no</tool_call> <tool_call>{"name": "f", "arguments": 7 '


def test_a_long_call_is_passed_on_piece_by_piece_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    class Counted(JsonObjectScanner):
        def scan(self, text: str) -> int | None:
            looked_at.append(len(text))
            return super().scan(text)

    monkeypatch.setattr(tool_calls, "JsonObjectScanner", Counted)
    arguments = json.dumps({"text": "word " * 4000})
    text = f"{PLAIN.opening}write{PLAIN.middle}{arguments}{PLAIN.closing}"
    _, calls, pieces = read_in_pieces(text, 4)
    assert calls == [["write", arguments]]
    assert pieces[0] > len(arguments) // 5
    assert sum(looked_at) <= len(arguments) + len(PLAIN.closing)


HERMES = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}{{ '\\n' if not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def style_of(folder: Path, template: str) -> ToolFormat:
    return chat_of(save_byte_tokenizer(folder, chat_template=template)).shape.tools


def test_the_format_of_calls_is_inferred_from_the_template(tmp_path: Path, byte_tokenizer: Path) -> None:
    hermes = style_of(tmp_path / "hermes", HERMES)
    assert (hermes.opening, hermes.closing) == ('<tool_call>\n{"name": "', "}\n</tool_call>")
    assert (hermes.separator, hermes.trigger, hermes.native) == ("\n", "<tool_call>", True)
    assert chat_of(byte_tokenizer).shape.tools is PLAIN  # its template does not support tools
    assert (
        style_of(tmp_path / "control", HERMES.replace("<tool_call>", "<|pad|>")) is PLAIN
    )  # a control token is never text


async def test_a_control_token_in_a_property_name_is_refused_and_in_a_value_is_text(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path, chat_template=HERMES)
    codec, chat = tokenizer_of(folder), chat_of(folder)
    with pytest.raises(InvalidRequestError, match="control token"):
        await codec.prompt_of_messages(
            HI, [{"function": {"parameters": {"properties": {"<|im_start|>": {}}}}}], chat=chat
        )
    forged = await codec.prompt_of_messages(HI, [{"function": {"description": "<|im_start|>"}}], chat=chat)
    honest = await codec.prompt_of_messages(HI, [{"function": {"description": ""}}], chat=chat)
    assert forged.ids.count(256) == honest.ids.count(256)
    assert bytes(token for token in forged.ids if token < 256).count(b"<|im_start|>") == 1


def test_the_calls_of_a_template_without_call_markers_begin_with_their_name() -> None:
    def render(messages: Any, tools: Any) -> str:
        if len(messages[-1].get("tool_calls", ())) > 1:
            raise ValueError("one call a turn")
        call = "".join(
            f'{{"name": "{c["function"]["name"]}", "parameters": {json.dumps(c["function"]["arguments"])}}}'
            for c in messages[-1].get("tool_calls", ())
        )
        return f"{json.dumps(tools)}|{messages[0]['content']}|{messages[-1]['content'] + call}<end>"

    style = infer_format(render, ["<end>"])
    assert (style.trigger, style.middle, style.closing) == ('{"name": "', '", "parameters": ', "}")
    assert style.separator is None
    choice = parse_chat(json.dumps({"model": "m", "messages": HI, "tools": [NOW]}).encode()).tools
    assert "call | text" in tools_grammar(choice, style).lark[0]


def test_the_tools_are_described_in_the_systems_message_if_there_is_one() -> None:
    plain = plain_messages([{"role": "system", "content": "Be kind."}, *HI], [NOW])
    assert [message["role"] for message in plain] == ["system", "user"]
    assert plain[0]["content"].startswith("Be kind.\n\nYou can call")
    assert plain_messages(HI, []) == HI
