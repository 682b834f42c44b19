"""`/tokenize` and `/detokenize` through the gateway give the tokens that a request to the same model has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import digest_of
from fakes_runtime import EOS, FakeStore, Served, save_byte_tokenizer, serving, tokenizer_of
from gateway_world import KEY, World, world

from lorapool_api.protocol import token_sha256

HI: list[Any] = [{"role": "user", "content": "hi"}]
OWN = "{% for m in messages %}<|new|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}GO{% endif %}"
NEW_ID = 258
"""The base's <|pad|>, a reserved token to which the adapter's tokenizer gives another text."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def served(tokenizer: Path) -> AsyncIterator[Served]:
    async with serving(tokenizer, store=FakeStore(), token_sha256=token_sha256("t" * 64), pod_uid="pod") as runtime:
        yield runtime


@pytest.fixture
async def here(served: Served) -> AsyncIterator[World]:
    async with world() as made:
        made.base()
        made.adapter("route")
        made.replica(served.url)
        yield made


async def ask(here: World, path: str, **body: Any) -> tuple[int, Any]:
    response = await here.post({"model": "tiny", **body}, path=path)
    answer = await response.json()
    return response.status, answer if response.status == 200 else answer["error"]


async def test_a_prompt_and_a_chat_have_the_tokens_that_the_engine_is_given(here: World, served: Served) -> None:
    for path, wish in (("/v1/completions", {"prompt": "héllo"}), ("/v1/chat/completions", {"messages": HI})):
        status, found = await ask(here, "/tokenize", **wish)
        assert (status, served.engine.requests) == (200, [])
        assert (await ask(here, path, **wish))[0] == 200
        given = served.engine.requests.pop().prompt_ids
        assert found == {"count": len(given), "max_model_len": 512, "tokens": list(given), "token_strs": None}


async def test_an_adapters_own_template_and_tokens_count(here: World, served: Served, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(OWN)
    token = f'{{"added_tokens_decoder": {{"{NEW_ID}": {{"content": "<|new|>", "special": true}}}}}}'
    (tmp_path / "tokenizer_config.json").write_text(token)
    served.store.folders["hf://org/route"] = tmp_path
    status, found = await ask(here, "/tokenize", model="route", messages=HI, return_token_strs=True)
    assert (status, found["tokens"]) == (200, [NEW_ID, *b"hiGO"])
    assert found["token_strs"] == ["<|new|>", "h", "i", "G", "O"]
    assert (await ask(here, "/v1/chat/completions", model="route", messages=HI))[0] == 200
    assert list(served.engine.requests[-1].prompt_ids) == found["tokens"]
    assert await ask(here, "/detokenize", model="route", tokens=found["tokens"]) == (200, {"prompt": "<|new|>hiGO"})
    assert await ask(here, "/detokenize", tokens=found["tokens"]) == (200, {"prompt": "<|pad|>hiGO"})


async def test_the_answer_names_what_tokenized_and_is_not_counted_as_generation(here: World, served: Served) -> None:
    response = await here.post({"model": "route", "prompt": "x"}, path="/tokenize")
    assert response.headers["x-lorapool-adapter"] == f"demo/route@{digest_of('route')}"
    assert here.sample("requests_total", base="demo/tiny", adapter="demo/route", code="200") == 0
    assert served.runtime.snapshot().in_flight == 0
    assert served.engine.requests == []


async def test_detokenize_writes_control_tokens_and_whole_characters(here: World) -> None:
    assert await ask(here, "/detokenize", tokens=[*"hé".encode(), EOS]) == (200, {"prompt": "hé<|im_end|>"})
    assert await ask(here, "/detokenize", tokens=[]) == (200, {"prompt": ""})


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/tokenize", {"prompt": ["a", "b"]}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "x", "colour": 1}, "colour"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_cannot_be_tokenized_is_refused_by_name(
    here: World, path: str, body: dict[str, Any], named: str
) -> None:
    status, error = await ask(here, path, **body)
    assert (status, error["param"]) == (400, named), error


async def test_the_routes_need_a_key_and_a_model(here: World) -> None:
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert (await ask(here, path, **body, model="nothing"))[0] == 404
        async with here.session.post(here.url + path, json={"model": "tiny", **body}) as response:
            assert response.status == 401
    assert KEY not in repr(await ask(here, "/tokenize", prompt="x"))


async def test_a_prompt_begins_with_the_start_token_unless_it_is_not_wanted(tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = save_byte_tokenizer(tmp_path)
    inner = AutoTokenizer.from_pretrained(folder)
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[
        ("<|im_start|>", 256)])  # fmt: skip
    inner.bos_token = "<|im_start|>"
    inner.save_pretrained(folder)
    tokenizer = tokenizer_of(folder)
    assert await tokenizer.prompt_of_text("x") == (256, ord("x"))
    assert await tokenizer.prompt_of_text("x", start_token=False) == (ord("x"),)
