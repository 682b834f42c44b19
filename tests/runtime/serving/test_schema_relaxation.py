"""Tools whose schemas have keywords that a grammar cannot enforce: relaxed and reported, or refused where strict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import EOS, VOCAB, Served, save_byte_tokenizer, tokenizer_of
from llguidance import LLMatcher, LLTokenizer

from lorapool_runtime.openai.tools.grammar import GrammarCompiler, json_grammar
from lorapool_runtime.openai.tools.grammar_spec import GrammarSpec, SchemaPart
from lorapool_runtime.openai.tools.json_schema import checked_schema
from lorapool_runtime.openai.tools.relaxation import header_value, relaxed

HI: list[Any] = [{"role": "user", "content": "hi"}]
RELAXED = "x-lorapool-relaxed"
WHERE = "tools[1].function.parameters.properties.a"
FINE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "fine", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}


def with_argument(schema: Any, **function: Any) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return [FINE, {"type": "function", "function": {"name": "f", "parameters": parameters, **function}}]


async def ask(served: Served, **fields: Any) -> tuple[int, str | None, dict[str, Any]]:
    """The status, the header that lists what is not enforced, and the body."""
    body = {"model": "tiny", "messages": HI, "max_tokens": 4, **fields}
    async with aiohttp.ClientSession(served.url) as http, http.post("/v1/chat/completions", json=body) as response:
        return response.status, response.headers.get(RELAXED), await response.json()


UNENFORCEABLE: list[tuple[dict[str, Any], list[str]]] = [
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}},
     ["propertyNames"]),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, ["uniqueItems"]),
    ({"type": "string", "format": "int32"}, ["format"]),
    ({"type": "string", "format": "base64", "contentEncoding": "base64"}, ["format"]),
    ({"type": "string", "format": "starts_with", "pattern": "^x.*"}, ["format"]),
    ({"not": {}}, ["not"]),
    ({"type": "string", "pattern": "^(?!-)[a-z]+$"}, ["pattern"]),
    ({"type": "array", "items": {"type": "string", "format": "path"}}, ["items.format"]),
    ({"anyOf": [{"type": "string", "format": "binary"}, {"type": "null"}]}, ["anyOf.0.format"]),
    ({"if": {"type": "string"}, "then": {"minLength": 1}}, ["if", "then"]),
    ({"type": "object", "properties": {"b": {}, "c": {}, "d": {}}, "minProperties": 2}, ["minProperties"]),
    ({"oneOf": [{"type": "string", "maxLength": 5}, {"type": "string", "minLength": 3}]}, ["oneOf"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "paths"), UNENFORCEABLE, ids=str)
async def test_a_keyword_that_cannot_be_enforced_is_left_out_and_reported(
    served: Served, schema: dict[str, Any], paths: list[str]
) -> None:
    status, header, body = await ask(served, tools=with_argument(schema))
    assert status == 200, body
    assert header == ", ".join(f"{WHERE}.{path}" for path in paths)
    assert served.engine.requests[-1].grammar is not None


@pytest.mark.parametrize(("schema", "paths"), UNENFORCEABLE, ids=str)
async def test_a_strict_tool_with_such_a_keyword_is_refused_with_the_place_and_the_remedy(
    served: Served, schema: dict[str, Any], paths: list[str]
) -> None:
    status, header, body = await ask(served, tools=with_argument(schema, strict=True))
    assert (status, header, body["error"]["param"]) == (400, None, "tools[1].function.parameters")
    assert all(f"`properties.a.{path}`" in body["error"]["message"] for path in paths), body
    assert "do not set `strict`" in body["error"]["message"]
    assert served.engine.requests == []


async def test_a_response_format_is_relaxed_or_refused_alike(served: Served) -> None:
    own = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "string", "format": "jwt"}}}}
    loose = await ask(served, response_format={"type": "json_schema", "json_schema": own})
    assert loose[:2] == (200, "response_format.json_schema.schema.properties.a.format")
    strict = await ask(served, response_format={"type": "json_schema", "json_schema": {**own, "strict": True}})
    assert strict[2]["error"]["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "format": "int32"},
        {"type": "string", "format": "date-time", "writeOnly": True},
        {"type": "string", "x-order": 3, "nullable": True},
        {"type": "object", "patternProperties": {"^x": {"type": "string"}}},
        {"type": "object", "properties": None, "required": None},
    ],
    ids=str,
)
async def test_what_is_enforced_or_an_annotation_is_not_reported(served: Served, schema: dict[str, Any]) -> None:
    status, header, body = await ask(served, tools=with_argument(schema, strict=True))
    assert (status, header) == (200, None), body


@pytest.mark.parametrize("schema", [{"type": "strin"}, {"anyOf": "x"}], ids=str)
async def test_a_schema_that_is_wrong_is_refused_even_where_it_is_not_strict(
    served: Served, schema: dict[str, Any]
) -> None:
    status, _, body = await ask(served, tools=with_argument(schema))
    assert (status, body["error"]["param"]) == (400, "tools[1].function.parameters")


# --- closed objects ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accepts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, Any], bool]:
    """Whether the grammar of a schema accepts a JSON value."""
    text = tokenizer_of(save_byte_tokenizer(tmp_path_factory.mktemp("bytes"))).grammar_json()
    tokenizer = LLTokenizer(text, n_vocab=VOCAB, eos_token=[EOS])

    def test(schema: Any, value: Any) -> bool:
        matcher = LLMatcher(tokenizer, json_grammar(checked_schema(schema, "x")), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = list(json.dumps(value).encode())
        return (
            matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()
        )

    return test


def test_an_object_is_closed_unless_additional_properties_are_given(accepts: Callable[[Any, Any], bool]) -> None:
    shape = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert accepts(shape, {"a": 1})
    assert not accepts(shape, {"a": 1, "b": 2})
    assert accepts({**shape, "additionalProperties": True}, {"a": 1, "b": 2})
    assert accepts({**shape, "additionalProperties": {"type": "integer"}}, {"a": 1, "b": 2})
    inner = {
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/shape"}, {"type": "null"}]},
        "$defs": {"shape": shape},
    }
    assert accepts(inner, [{"a": 1}, None])
    assert not accepts(inner, [{"b": 2}])
    assert accepts({"type": "object"}, {"anything": 1})


def test_objects_that_are_merged_are_left_open(accepts: Callable[[Any, Any], bool]) -> None:
    a, b = ({"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab")
    both = {"a": 1, "b": 2}
    assert accepts({"allOf": [a, b]}, both)
    assert accepts({**a, "anyOf": [b, {"required": ["c"]}]}, both)
    assert accepts({**a, "$ref": "#/$defs/b", "$defs": {"b": b}}, both)
    assert accepts({"allOf": [{"anyOf": [a, {"type": "object"}]}, {"$ref": "#/$defs/b"}], "$defs": {"b": b}}, both)
    assert accepts({"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}, both)


@pytest.mark.parametrize(
    "parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}, {"properties": None}], ids=str
)
async def test_a_tool_that_lists_no_arguments_is_called_with_an_empty_object(
    served: Served, parameters: dict[str, Any] | None
) -> None:
    function = {"name": "now"} if parameters is None else {"name": "now", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    status, _, body = await ask(served, tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert status == 200, body
    grammar = served.engine.requests[-1].grammar
    assert grammar is not None
    constraint = grammar.constraint()
    for token in b'<tool_call>{"name": "now", "arguments": {}}</tool_call>':
        constraint.accept(token)
    assert constraint.complete


async def test_arguments_without_a_type_are_an_object(served: Served) -> None:
    status, _, _ = await ask(served, tools=[{"type": "function", "function": {"name": "f", "parameters": {
        "properties": {"a": {"type": "integer"}}}}}])  # fmt: skip
    assert status == 200


# --- parts ---------------------------------------------------------------------------------


def test_the_library_is_asked_about_each_keyword_of_the_node_that_it_refuses() -> None:
    asked: list[Any] = []

    def fails(schema: dict[str, Any]) -> bool:
        asked.append(schema)
        return "bad" in json.dumps(schema)

    schema = {"type": "object", "properties": {"bad": {"type": "string", "minLength": 1, "format": "bad"}}}
    made, dropped = relaxed(schema, fails)
    assert made["properties"] == {"bad": {"type": "string", "minLength": 1}}
    assert dropped == ("properties.bad.format",)
    assert {"type": "string", "minLength": 1} in asked


def test_a_header_has_visible_ascii_only() -> None:
    assert header_value(["a.b", "x\r\ny: 1, ä"]) == "a.b, x??y:?1???"
    assert len(header_value(["x" * 5000])) == 1000


async def test_a_relaxed_grammar_is_made_once_and_cached(byte_tokenizer: Path) -> None:
    compiler = GrammarCompiler(
        tokenizer_of(byte_tokenizer).grammar_json(), vocab_size=VOCAB, eos_token_ids={EOS}, timeout_s=5.0
    )
    spec = GrammarSpec("p", (SchemaPart("p", '{"type":"string","format":"jwt"}', strict=False),))
    first = await compiler.compile(spec)
    assert (await compiler.compile(spec)) is first
    assert first.relaxed == ("p.format",)
    compiler.close()
