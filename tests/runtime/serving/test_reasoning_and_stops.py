"""Reasoning apart from the answer, variables of templates, stop tokens, and prompts that begin with the start token."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from fakes_runtime import EOS, FakeEngine, Served, save_byte_tokenizer, serving, tokenizer_of
from transformers import AutoTokenizer

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.openai.reasoning import Piece, ReasoningReader, ReasoningStart, reasoning_start, split_reasoning
from lorapool_runtime.openai.request import parse_chat

HI: list[Any] = [{"role": "user", "content": "hi"}]
START, END, PAD = 256, EOS, 258
THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% elif reasoning_effort == 'high' %}<think>
{% endif %}{% endif %}"""


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    folder = save_byte_tokenizer(tmp_path, chat_template=THINKS)
    async with serving(folder, engine=FakeEngine(max_model_len=4096)) as running:
        yield running


def says(served: Served, answer: str | list[int]) -> None:
    served.engine.reply = lambda *_: answer


def prompt_of(served: Served) -> str:
    return bytes(token for token in served.engine.requests[-1].prompt_ids if token < 256).decode()


# --- reasoning --------------------------------------------------------------------------------


async def chat(client: openai.AsyncOpenAI, stream: bool, **wish: Any) -> tuple[str | None, str | None, Any]:
    """(reasoning, content, tool calls), the same whether streamed or whole."""
    asked = {"model": "tiny", "messages": HI, "max_tokens": 200} | wish
    if not stream:
        message = (await client.chat.completions.create(**asked)).choices[0].message
        return getattr(message, "reasoning_content", None), message.content, message.tool_calls
    reasoning, content, calls = "", "", []
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        calls += delta.tool_calls or []
    return reasoning or None, content or None, calls or None


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_apart_from_the_content(client: openai.AsyncOpenAI, served: Served, stream: bool) -> None:
    says(served, "<think>\nIs it? It is.\n</think>\n\nYes, <think> is text.")
    assert await chat(client, stream) == ("Is it? It is.", "Yes, <think> is text.", None)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_ends_while_it_reasons_has_no_content(
    client: openai.AsyncOpenAI, served: Served, stream: bool
) -> None:
    says(served, "<think>\nIs it?")
    reasoning, content, _ = await chat(client, stream)
    assert (reasoning, content or "") == ("Is it?", "")


@pytest.mark.parametrize(("answer", "reasoning"), [("<think>Is it?</think>Yes.", 21), ("Yes.", 0), ("<think>Is", 10)])
async def test_the_usage_counts_the_tokens_of_the_reasoning_with_its_tags(
    client: openai.AsyncOpenAI, served: Served, answer: str, reasoning: int
) -> None:
    says(served, answer)
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "n": 2}
    whole = await client.chat.completions.create(**asked)
    options: Any = {"include_usage": True}
    stream = await client.chat.completions.create(**asked, stream=True, stream_options=options)
    last = [chunk async for chunk in stream][-1]
    response = await client.responses.create(model="tiny", input="hi")
    for usage in (whole.usage, last.usage):
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == 2 * reasoning
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == reasoning


async def test_a_template_that_opens_the_reasoning_itself_is_understood(
    client: openai.AsyncOpenAI, served: Served
) -> None:
    says(served, "It is.\n</think>\n\nYes.")
    assert await chat(client, False, reasoning_effort="high") == ("It is.", "Yes.", None)
    assert prompt_of(served).endswith("<think>\n")


@pytest.mark.parametrize(
    "wish", [{"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}],
    ids=["effort", "kwargs"],
)  # fmt: skip
async def test_reasoning_is_switched_off_by_either_parameter(
    client: openai.AsyncOpenAI, served: Served, wish: dict[str, Any]
) -> None:
    says(served, "Yes, <think>no</think>.")
    assert await chat(client, False, **wish) == (None, "Yes, <think>no</think>.", None)
    assert prompt_of(served).endswith("<think>\n\n</think>\n\n")


async def test_kwargs_win_over_the_effort_and_reserved_names_are_refused(served: Served) -> None:
    fields = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    options = parse_chat(json.dumps({"model": "m", "messages": HI, **fields}).encode()).template
    assert options.variables == {"reasoning_effort": "none", "enable_thinking": True}
    for name in ("messages", "tools", "add_generation_prompt", "a b", "bos_token"):
        with pytest.raises(InvalidRequestError) as caught:
            parse_chat(json.dumps({"model": "m", "messages": HI, "chat_template_kwargs": {name: 1}}).encode())
        assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_after_reasoning_are_calls(client: openai.AsyncOpenAI, served: Served, stream: bool) -> None:
    says(served, '<think>\nI look.\n</think>\n\n<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    tools = [{"type": "function", "function": {"name": "now"}}]
    reasoning, content, calls = await chat(client, stream, tools=tools)
    assert (reasoning, content) == ("I look.", None)
    assert calls[0].function.name == "now"


async def test_an_answer_that_a_schema_begins_with_has_no_reasoning(client: openai.AsyncOpenAI, served: Served) -> None:
    says(served, "{}")
    wish = {"response_format": {"type": "json_object"}, "reasoning_effort": "high"}
    assert await chat(client, False, **wish) == (None, "{}", None)


async def test_tags_are_text_where_the_template_does_not_know_them(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "<think>x</think>y")
    async with (
        serving(byte_tokenizer, engine=engine) as served,
        aiohttp.ClientSession(served.url) as http,
        http.post("/v1/chat/completions", json={"model": "tiny", "messages": HI}) as response,
    ):
        message = (await response.json())["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>x</think>y", "refusal": None}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("start", "text", "reasoning", "content"),
    [
        (ReasoningStart.MAYBE, " <think>\n a </thin b \n </think>\n\n c <think>", "a </thin b", "c <think>"),
        (ReasoningStart.MAYBE, "<thin ice", "", "<thin ice"),
        (ReasoningStart.MAYBE, "<think>", "", ""),
        (ReasoningStart.MAYBE, "<think>a</thi", "a</thi", ""),
        (ReasoningStart.MAYBE, "<think>a \n b</think>", "a \n b", ""),
        (ReasoningStart.INSIDE, "a</think>b", "a", "b"),
        (ReasoningStart.NONE, "a</think>b", "", "a</think>b"),
    ],
)  # fmt: skip
def test_reasoning_is_read_the_same_however_the_text_is_split(
    start: ReasoningStart, text: str, reasoning: str, content: str, size: int
) -> None:
    reader = ReasoningReader(start)
    pieces = [reader.push(text[at : at + size]) for at in range(0, len(text), size)] + [reader.finish()]
    assert Piece("".join(p.reasoning for p in pieces), "".join(p.content for p in pieces)) == (reasoning, content)


def test_the_end_of_the_prompt_shows_how_the_answer_begins() -> None:
    assert reasoning_start("x<think>\n", continues=False) is ReasoningStart.INSIDE
    assert reasoning_start("x<think>\n\n</think>\n\n", continues=False) is ReasoningStart.NONE
    assert reasoning_start("<think>a</think>b<|im_end|>assistant\n", continues=False) is ReasoningStart.MAYBE
    assert reasoning_start("assistant\n<think>half", continues=True) is ReasoningStart.INSIDE
    assert reasoning_start("assistant\nhalf", continues=True) is ReasoningStart.NONE
    assert split_reasoning("<think>a</think>b") == ("a", "b")


# --- stops ------------------------------------------------------------------------------------


async def complete(served: Served, **wish: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession(served.url) as http:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 12, **wish}
        async with http.post("/v1/completions", json=body) as response:
            answer = await response.json()
            return response.status, answer["choices"][0] if response.status == 200 else answer["error"]


ANSWER = [ord("a"), ord("b"), PAD, ord("c"), ord("d")]


@pytest.mark.parametrize(
    ("wish", "text", "finish"),
    [
        ({}, "abcd", "stop"),
        ({"stop": ["<|pad|>"]}, "ab", "stop"),
        ({"stop": "<|pad|>\n"}, "ab", "stop"),
        ({"stop_token_ids": [PAD]}, "ab", "stop"),
        ({"stop_token_ids": [ord("c")]}, "ab", "stop"),
        ({"stop_token_ids": [ord("c")], "include_stop_str_in_output": True}, "abc", "stop"),
        ({"stop_token_ids": [PAD], "ignore_eos": True}, "ab", "stop"),
        ({"stop_token_ids": [PAD], "include_stop_str_in_output": True}, "ab", "stop"),
        ({"stop": ["bc"], "include_stop_str_in_output": True}, "abc", "stop"),
        ({"stop": ["c"]}, "ab", "stop"),
        ({"skip_special_tokens": False, "max_tokens": 5}, "ab<|pad|>cd", "length"),
        ({"skip_special_tokens": False, "stop": ["<|pad|>"]}, "ab", "stop"),
        ({"skip_special_tokens": False, "stop": ["b<|pad|>"], "include_stop_str_in_output": True}, "ab<|pad|>", "stop"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
async def test_answers_end_where_the_request_says(served: Served, wish: dict[str, Any], text: str, finish: str) -> None:
    says(served, [*ANSWER, END])
    status, choice = await complete(served, **wish)
    assert (status, choice["text"], choice["finish_reason"]) == (200, text, finish)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"stop": ["b<|pad|>"]}, "stop"),
        ({"stop_token_ids": [5000]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
async def test_a_stop_that_could_never_be_found_is_refused(served: Served, wish: dict[str, Any], param: str) -> None:
    status, error = await complete(served, **wish)
    assert (status, error["param"]) == (400, param)


# --- the start token --------------------------------------------------------------------------


async def test_a_prompt_that_begins_with_the_start_token_has_it_once(tmp_path: Path) -> None:
    from tokenizers import processors

    made = AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path))
    made.bos_token = "<|im_start|>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    made.save_pretrained(tmp_path)
    tokenizer = tokenizer_of(tmp_path)
    assert await tokenizer.prompt_of_text("ab") == (START, 97, 98)
    assert await tokenizer.prompt_of_text("<|im_start|>ab") == (START, 97, 98)
    assert await tokenizer.prompt_of_text("<|im_start|><|im_start|>ab") == (START, START, 97, 98)
