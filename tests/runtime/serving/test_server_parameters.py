"""Every parameter, by the unmodified openai client, against the runtime's own process with the real engine."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from engine_kit import tiny_model
from fakes_runtime import chat_of, save_byte_tokenizer
from runtime_process import TOKEN, RuntimeProcess, runtime_process

HI: list[Any] = [{"role": "user", "content": "hi"}]
PROMPT = "Once upon"
EOS = 257


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama", eos_token_id=EOS, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return save_byte_tokenizer(folder)


@pytest.fixture(scope="module")
def process(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuntimeProcess]:
    with runtime_process(tmp_path_factory.mktemp("process"), base, max_batch=64) as running:
        yield running


@pytest.fixture
async def client(process: RuntimeProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=process.url + "/v1", api_key=TOKEN, max_retries=0, timeout=300) as made:
        yield made


async def say(client: openai.AsyncOpenAI, **wish: Any) -> Any:
    own = {name: wish.pop(name) for name in ("top_k", "min_p", "repetition_penalty", "ignore_eos") if name in wish}
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24} | wish
    more = asked.pop("extra_body", {})
    return await client.completions.create(**asked, extra_body={"ignore_eos": True} | own | more)


async def text(client: openai.AsyncOpenAI, **wish: Any) -> str:
    return (await say(client, **wish)).choices[0].text


async def test_temperature_seed_and_the_filters(client: openai.AsyncOpenAI) -> None:
    greedy = await text(client, temperature=0)
    assert greedy == await text(client, temperature=0)
    assert greedy == await text(client, top_k=1) == await text(client, top_p=1e-6) == await text(client, min_p=1.0)
    one, again, other = [await text(client, seed=seed, temperature=1.3) for seed in (5, 5, 6)]
    assert one == again != other
    assert await text(client, seed=5, temperature=1.3, top_k=1_000_000, top_p=1.0, min_p=0.0) == one


async def test_a_seed_gives_the_same_text_whatever_shares_the_batch(client: openai.AsyncOpenAI) -> None:
    wish: dict[str, Any] = {"seed": 11, "temperature": 1.1, "top_p": 0.9, "max_tokens": 40}
    alone = await text(client, **wish)
    noise = [say(client, temperature=0.1 * i, prompt="x" * i, max_tokens=5 * i, top_k=i) for i in range(1, 15)]
    crowd, *_ = await asyncio.gather(say(client, **wish), *noise)
    assert crowd.choices[0].text == alone


async def test_choices_of_one_request_differ_and_repeat_by_seed(client: openai.AsyncOpenAI) -> None:
    first, second = [await say(client, n=3, seed=4, temperature=1.5) for _ in range(2)]
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    assert texts[1] == await text(client, seed=5, temperature=1.5)
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (len(PROMPT), 72)


async def test_penalties_and_biases_change_the_text(client: openai.AsyncOpenAI) -> None:
    plain = await say(client, temperature=0, max_tokens=60, logprobs=0)
    said = plain.choices[0].logprobs.tokens
    penalties: tuple[dict[str, Any], ...] = (
        {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0},
    )  # fmt: skip
    for penalty in penalties:
        less = await say(client, temperature=0, max_tokens=60, logprobs=0, **penalty)
        assert len(set(less.choices[0].logprobs.tokens)) > len(set(said)), penalty
    assert await text(client, logit_bias={"65": 100}, max_tokens=5) == "AAAAA"
    first = (await say(client, temperature=0, prompt=[1, 2, 3], max_tokens=1, logprobs=0)).choices[0].text
    banned = {str(token): -100 for token in range(259) if chr(token) == first}
    assert await text(client, temperature=0, prompt=[1, 2, 3], max_tokens=1, logit_bias=banned) != first or not banned


async def test_stop_strings_limits_and_the_end_token(client: openai.AsyncOpenAI) -> None:
    whole = await text(client, temperature=0, max_tokens=60)
    stop = whole[10:13]
    cut = await say(client, temperature=0, max_tokens=60, stop=["\x00never", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    limited = await say(client, max_tokens=7)
    assert (limited.choices[0].finish_reason, limited.usage.completion_tokens) == ("length", 7)
    chat = await client.chat.completions.create(
        model="tiny", messages=HI, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert chat.usage.completion_tokens == 3
    ended = await say(client, ignore_eos=False, logit_bias={str(EOS): 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 1)
    late = await say(client, ignore_eos=False, logit_bias={str(EOS): 100}, extra_body={"min_tokens": 5})
    assert (late.choices[0].finish_reason, late.usage.completion_tokens) == ("stop", 6)
    going_on = await say(client, ignore_eos=True, logit_bias={str(EOS): 100}, max_tokens=4)
    assert (going_on.choices[0].finish_reason, going_on.usage.completion_tokens) == ("length", 4)


async def test_a_prompt_as_text_ids_or_in_a_list_gives_the_same_answer(client: openai.AsyncOpenAI) -> None:
    ids = list(PROMPT.encode())
    wanted = await text(client, temperature=0)
    assert await text(client, temperature=0, prompt=ids) == wanted
    many = await say(client, temperature=0, prompt=[PROMPT, "other"])
    assert many.choices[0].text == wanted
    both = await say(client, temperature=0, prompt=[ids, [1, 2]], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == wanted


async def test_echo_scores_prompts_as_transformers_does(client: openai.AsyncOpenAI, model: Any) -> None:
    ids = [7, 99, 250, 3, 65, 65, 120]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    wanted = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    answer = await say(client, prompt=ids, echo=True, logprobs=3, max_tokens=0)
    logprobs_of_prompt = answer.choices[0].logprobs
    assert logprobs_of_prompt.token_logprobs[0] is None
    assert logprobs_of_prompt.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    best = logprobs[:-1].max(dim=-1).values.tolist()
    assert [max(top.values()) for top in logprobs_of_prompt.top_logprobs[1:]] == pytest.approx(best, abs=1e-4)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 0)
    longer = await say(client, prompt=[ids, ids[:3]], echo=True, logprobs=1, max_tokens=1, temperature=0)
    assert [len(choice.logprobs.tokens) for choice in longer.choices] == [8, 4]
    assert longer.choices[0].logprobs.token_logprobs[1:7] == pytest.approx(wanted, abs=1e-4)


async def test_logprobs_of_a_chat_and_usage_in_a_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=6, logprobs=True, top_logprobs=2, stream=True, temperature=0,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    entries, usage = [], None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            entries += choice.logprobs.content if choice.logprobs else []
    assert len(entries) == 6
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0 for entry in entries)
    assert usage is not None
    assert usage.completion_tokens == 6


async def schema_answer(client: openai.AsyncOpenAI, schema: dict[str, Any], seed: int) -> Any:
    return await client.chat.completions.create(
        model="tiny",
        messages=HI,
        seed=seed,
        max_tokens=1800,
        response_format={"type": "json_schema", "json_schema": {"name": "made", "strict": True, "schema": schema}},
    )


async def test_fifty_random_schemas_are_enforced_exactly_and_do_not_change_other_answers(
    client: openai.AsyncOpenAI,
) -> None:
    schemas = [random_schema(seed) for seed in range(50)]
    alone = await text(client, temperature=0, max_tokens=80)
    plain = [text(client, temperature=0, max_tokens=80) for _ in range(4)]
    asked = [schema_answer(client, schema, seed) for seed, schema in enumerate(schemas)]
    *plain_texts, answers = await asyncio.gather(*plain, asyncio.gather(*asked))
    assert plain_texts == [alone] * 4
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.choices[0].finish_reason == "stop", (schema, answer.choices[0].message.content)
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    again = await schema_answer(client, schemas[7], 7)
    assert again.choices[0].message.content == answers[7].choices[0].message.content


async def test_any_json_object_and_a_completion_under_a_schema(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=HI, response_format={"type": "json_object"}, seed=2, max_tokens=1800
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    own = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    done = await client.completions.create(model="tiny", prompt="x", max_tokens=50, n=3, extra_body=own)
    assert {choice.text for choice in done.choices} <= {'{"a": 1}', '{"a": 2}'}


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_forced_calls_are_valid_whole_and_streamed(client: openai.AsyncOpenAI, choice: Any) -> None:
    wish: dict[str, Any] = {
        "model": "tiny", "messages": HI, "tools": [WEATHER, NOW], "tool_choice": choice, "seed": 3, "max_tokens": 1400,
    }  # fmt: skip
    answer = await client.chat.completions.create(**wish)
    calls = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    for call in calls:
        schema = WEATHER["function"]["parameters"] if call.function.name == "get_weather" else {"maxProperties": 0}
        jsonschema.validate(json.loads(call.function.arguments), schema)
    if choice != "required":
        assert [call.function.name for call in calls] == ["get_weather"]
    streamed: dict[int, list[str]] = {}
    async for chunk in await client.chat.completions.create(**wish, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            call = streamed.setdefault(part.index, [part.function.name, ""])
            call[1] += part.function.arguments
    assert list(streamed.values()) == [[call.function.name, call.function.arguments] for call in calls]


async def test_without_parallel_calls_an_answer_has_one_call_at_most(client: openai.AsyncOpenAI) -> None:
    for seed in range(3):
        answer = await client.chat.completions.create(
            model="tiny", messages=HI, tools=[NOW], tool_choice="required", parallel_tool_calls=False, seed=seed,
            max_tokens=200,
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("now", "{}")


async def test_a_model_left_free_may_answer_in_words(client: openai.AsyncOpenAI, base: Path) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=HI, tools=[NOW], seed=1, max_tokens=30)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.choices[0].message.tool_calls is None
    assert chat_of(base).template is not None


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "x" * 2049}, "prompt", "2048"),
    ({"extra_body": {"invented": 1}}, "invented", "Unknown"),
    ({"logit_bias": {"320": 1}}, "logit_bias", "320"),
    ({"temperature": 1e300}, "temperature", "2"),
    ({"prompt": ["x"] * 40, "n": 2}, "prompt", "64"),
    ({"prompt": ["x"] * 64, "max_tokens": 2000}, "max_tokens", "tokens"),
    ({"prompt": [[320]]}, "prompt", "320"),
]


async def test_a_parameter_out_of_bounds_is_refused_and_running_answers_do_not_change(
    client: openai.AsyncOpenAI,
) -> None:
    wish: dict[str, Any] = {"temperature": 0, "max_tokens": 300}
    alone = await text(client, **wish)
    running = [asyncio.create_task(text(client, **wish)) for _ in range(3)]
    for fields, param, words in BAD:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(**{"model": "tiny", "prompt": PROMPT, **fields})
        body: Any = caught.value.body
        assert body["param"] == param, body
        assert words in body["message"], body
    assert await asyncio.gather(*running) == [alone] * 3


_WORDS = ("id", "name", "count", "tags", "kind", "price", "näme", "a b", 'quo"te', "note")


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of an object, as in `response_format`; equal seeds give equal schemas."""
    rng = random.Random(seed)
    return _object(rng, 3) | {"title": f"schema {seed}", "$defs": {"leaf": _integer(rng, 0)}}


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _boolean, _enum, _const, _pattern]
    if depth > 0:
        kinds += [_object, _array, _union, _nullable]
    return rng.choice(kinds)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }
    if rng.random() < 0.2:
        made["properties"]["self"] = {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}
    return made


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth), _any(rng, depth)]}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth), {"type": "null"}]}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": rng.choice(("^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(yes|no|maybe)$", "^#[0-9a-f]{6}$")),
    }


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 500)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 9)} if rng.random() < 0.5 else {"type": "number"}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "green", 7, 2.5, None, True, "blü"], rng.randint(1, 4))}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 3, False])}
