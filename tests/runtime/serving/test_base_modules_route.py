"""A runtime of a multimodal base publishes its modules, and serves an adapter that the operator checks against them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from engine_kit import peft_world
from fakes_runtime import save_byte_tokenizer, tokenizer_of
from multimodal_kit import tiny_gemma3
from runtime_process import TOKEN, runtime_process

from lorapool_api.base_modules import BaseModules, ModuleKind
from lorapool_api.protocol import ROUTE_BASE_MODULES, ResolveAnswer
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.inspect import inspect_adapter_folder
from lorapool_artifacts.settings import AdapterLimits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


async def test_a_multimodal_base_is_published_and_serves_what_the_operator_accepts(tmp_path: Path) -> None:
    tunes = tmp_path / "pvc" / "tunes"
    world = peft_world(tunes, tiny_gemma3(), {"plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]}})
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
            kinds = {entry.kind for entry in published.modules}
            assert {ModuleKind.LINEAR, ModuleKind.OUTPUT, ModuleKind.EMBEDDING, ModuleKind.UNUSED} <= kinds
            facts = BaseFacts.published(published)
            checked = await asyncio.to_thread(
                inspect_adapter_folder, world.adapters["plain"], facts, AdapterLimits(max_rank=16)
            )
            assert checked.compatibility.ok, checked.compatibility.message
            assert "no text passes" in checked.compatibility.message
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
