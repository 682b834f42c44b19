"""The files that an adapter brings besides its matrices belong to it: listed, fetched, and part of its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import artifact_zoo as zoo
import pytest
from artifact_hub import Hub

from lorapool_api.common import FileDigest, artifact_digest
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.inspect import inspect_adapter
from lorapool_artifacts.settings import AdapterLimits, SourceSettings

LIMITS = AdapterLimits(max_rank=8, max_bytes=1_000_000)
WEIGHTS = ["adapter_config.json", "adapter_model.safetensors"]
OWN = {
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"eos_token_id": 7}',
    "tokenizer.json": b"{}" + b" " * 2000,
    "tokenizer_config.json": b"{}",
}
FILES = {**zoo.adapter_files(), **OWN, "vocab.json": b"{}"}


def digest_of(names: list[str], files: dict[str, bytes] = FILES) -> str:
    return artifact_digest(
        FileDigest(name, len(files[name]), hashlib.sha256(files[name]).hexdigest()) for name in names
    )


ALL, OLDER = digest_of([*WEIGHTS, *OWN]), digest_of(WEIGHTS)


@pytest.fixture(params=["hf", "pvc"])
def source(request: pytest.FixtureRequest, hub: Hub, hf: SourceSettings, tmp_path: Path) -> tuple[str, SourceSettings]:
    if request.param == "hf":
        hub.repos["acme/lora"] = FILES
        return "hf://acme/lora", hf
    folder = tmp_path / "pvc" / "claim" / "lora"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return "pvc://claim/lora", SourceSettings(pvc_root=tmp_path / "pvc")


async def test_they_are_fetched_and_part_of_the_digest(source: tuple[str, SourceSettings], tmp_path: Path) -> None:
    uri, settings = source
    seen = await inspect_adapter(uri, None, None, None, LIMITS, settings)
    assert (seen.digest, seen.weights_digest) == (ALL, OLDER)
    path = await fetch(await resolve(uri, settings=settings), tmp_path / "cache", ALL)
    assert folder_digest(path) == ALL
    assert zoo.names_in(path) == sorted([*WEIGHTS, *OWN])


async def test_a_digest_of_the_weights_alone_keeps_its_meaning(
    source: tuple[str, SourceSettings], tmp_path: Path
) -> None:
    uri, settings = source
    seen = await inspect_adapter(uri, None, OLDER, None, LIMITS, settings)
    assert seen.digest == OLDER
    assert seen.size_bytes == sum(len(FILES[name]) for name in WEIGHTS)
    path = await fetch(await resolve(uri, settings=settings), tmp_path / "cache", OLDER)
    assert folder_digest(path) == OLDER
    assert zoo.names_in(path) == WEIGHTS
