"""A runtime publishes its base's modules, and serves an adapter that the operator checks against them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from engine_kit import PeftWorld, peft_world, tiny_model
from fakes_runtime import save_byte_tokenizer, tokenizer_of
from multimodal_kit import glm_with_extra_layers, llama_without_prefix, tiny_gemma3
from runtime_process import TOKEN, runtime_process

from lorapool_api.base_modules import BaseModules, ModuleKind
from lorapool_api.protocol import ROUTE_BASE_MODULES, ResolveAnswer
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.inspect import inspect_adapter_folder
from lorapool_artifacts.settings import AdapterLimits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


PLAIN = {"plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}


def gemma3(tunes: Path) -> PeftWorld:
    return peft_world(tunes, tiny_gemma3(), PLAIN)


def glm4(tunes: Path) -> PeftWorld:
    extra = glm_with_extra_layers(tunes / "glm")
    world = peft_world(tunes, extra.model, PLAIN)
    world.base = extra.folder
    return world


def without_prefix(tunes: Path) -> PeftWorld:
    model = tiny_model("Llama")
    world = peft_world(tunes, model, PLAIN)
    world.base = llama_without_prefix(tunes / "saved", model)
    return world


COMMON_KINDS = {ModuleKind.LINEAR, ModuleKind.OUTPUT, ModuleKind.EMBEDDING}


@pytest.mark.parametrize(
    ("make", "kinds"),
    [(gemma3, COMMON_KINDS | {ModuleKind.UNUSED}), (glm4, COMMON_KINDS), (without_prefix, COMMON_KINDS)],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_base_is_published_and_serves_what_the_operator_accepts(
    make: Callable[[Path], PeftWorld], kinds: set[ModuleKind], tmp_path: Path
) -> None:
    tunes = tmp_path / "pvc" / "tunes"
    world = await asyncio.to_thread(make, tunes)
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    for file in tokenizer.iterdir():
        (world.base / file.name).write_bytes(file.read_bytes())
    with runtime_process(tmp_path, world.base, pvc_root=tmp_path / "pvc") as running:
        async with aiohttp.ClientSession(running.url) as stranger, stranger.get(ROUTE_BASE_MODULES) as refused:
            assert refused.status == 401
        async with aiohttp.ClientSession(running.url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
            async with session.get(ROUTE_BASE_MODULES) as answer:
                raw = await answer.read()
            published = BaseModules.model_validate_json(raw)
            assert len(raw) < 8000
            assert kinds <= {entry.kind for entry in published.modules}
            facts = BaseFacts.published(published)
            checked = await asyncio.to_thread(
                inspect_adapter_folder, world.adapters["plain"], facts, AdapterLimits(max_rank=16)
            )
            assert checked.compatibility.ok, checked.compatibility.message
            assert ("no text passes" in checked.compatibility.message) == (make is gemma3)
            source = {"uri": "pvc://tunes/plain"}
            async with session.post("/v1/resolve", json={"source": source}) as answer:
                digest = ResolveAnswer.model_validate(await answer.json()).digest
            assert digest == checked.digest
            body = {"display": "team/plain", "source": source}
            async with session.put(f"/v1/adapters/uid-plain/{digest}", json=body) as answer:
                assert answer.status == 200
            asked = {"model": "x", "prompt": [72, 105, 33], "max_tokens": 10, "temperature": 0, "ignore_eos": True}
            headers = {"x-lorapool-adapter": f"uid-plain@{digest}"}
            async with session.post("/v1/completions", json=asked, headers=headers) as answer:
                text = (await answer.json())["choices"][0]["text"]
    assert text == tokenizer_of(tokenizer).decode(world.answer("plain", [72, 105, 33], 10))
