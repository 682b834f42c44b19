"""Selects the files of an artifact from a source's listing: a fixed list per kind; no other file is ever fetched.

Pure. Sources that only hold pickles or archives are refused by file name, before a byte of them is read. Python files
and files in subfolders are never selected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lorapool_api.common import FailureReason, FileDigest, artifact_digest
from lorapool_artifacts.errors import ArtifactError


class ArtifactKind(StrEnum):
    """What an artifact's files make up."""

    ADAPTER = "adapter"
    BASE = "base"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its source lists it."""

    name: str
    size_bytes: int
    sha256: str | None = None
    """Hex digits, where the source lists them; None: only a download gives the hash."""


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_CONFIG = "config.json"
BASE_WEIGHTS = "model.safetensors"
BASE_INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "added_tokens.json",
)
SHARD = re.compile(r"^model-(\d{5})-of-(\d{5})\.safetensors$")

_PICKLES = re.compile(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", re.IGNORECASE)
_ARCHIVES = re.compile(r"\.(tar|tgz|tbz2?|txz|zip|7z|rar|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_WEIGHTLIKE_PICKLES = re.compile(r"^(adapter_model|pytorch_model|model|consolidated|lora|weights)\b", re.IGNORECASE)


def select_files(kind: ArtifactKind, listing: Iterable[RemoteFile], *, where: str) -> tuple[RemoteFile, ...]:
    """The files of the artifact, sorted by name. Raises ArtifactError when the source holds no such artifact."""
    by_name = {file.name: file for file in listing if "/" not in file.name}
    names = _adapter_names(by_name, where) if kind is ArtifactKind.ADAPTER else _base_names(by_name, where)
    return tuple(by_name[name] for name in sorted(names) if name in by_name)


def digest_of(files: Sequence[RemoteFile]) -> str | None:
    """The artifact's digest, or None when the hash of a file is unknown."""
    known = [FileDigest(file.name, file.size_bytes, file.sha256) for file in files if file.sha256 is not None]
    return artifact_digest(known) if files and len(known) == len(files) else None


def _adapter_names(by_name: dict[str, RemoteFile], where: str) -> set[str]:
    if ADAPTER_WEIGHTS not in by_name:
        raise _without_weights(by_name, where, ADAPTER_WEIGHTS, "adapter")
    if ADAPTER_CONFIG not in by_name:
        raise ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} holds {ADAPTER_WEIGHTS} but no {ADAPTER_CONFIG}; upload both files that peft's "
            "save_pretrained() writes.",
        )
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS}


def _base_names(by_name: dict[str, RemoteFile], where: str) -> set[str]:
    shards = {name for name in by_name if SHARD.match(name)}
    if BASE_WEIGHTS in by_name:
        weights = {BASE_WEIGHTS}
    elif shards:
        weights = shards | {BASE_INDEX}
        _check_shards(shards, by_name, where)
    else:
        raise _without_weights(by_name, where, BASE_WEIGHTS, "model")
    if BASE_CONFIG not in by_name:
        raise ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} holds no {BASE_CONFIG}; upload the folder that save_pretrained() writes.",
        )
    return weights | {BASE_CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES}


def _check_shards(shards: set[str], by_name: dict[str, RemoteFile], where: str) -> None:
    totals = {name.rpartition("-of-")[2] for name in shards}
    count = int(min(totals)[:5])
    if len(totals) != 1 or len(shards) != count or {int(name[6:11]) for name in shards} != set(range(1, count + 1)):
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT,
            f"{where} holds {len(shards)} weight shards that are not one complete set; upload all files of one "
            "save_pretrained().",
        )
    if BASE_INDEX not in by_name:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT, f"{where} holds weight shards but no {BASE_INDEX}; upload it too."
        )


def _without_weights(by_name: dict[str, RemoteFile], where: str, wanted: str, noun: str) -> ArtifactError:
    """The error of a source without weights; it names what the source holds instead and the remedy."""
    names = sorted(by_name)
    pickles = [name for name in names if _PICKLES.search(name)]
    pickles.sort(key=lambda name: not _WEIGHTLIKE_PICKLES.match(name))
    if pickles:
        return ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} holds its weights as a pickle ({pickles[0]}), which can run code and is never read; "
            f"re-save the {noun} with save_pretrained(safe_serialization=True) and upload {wanted}.",
        )
    if archives := [name for name in names if _ARCHIVES.search(name)]:
        return ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} holds an archive ({archives[0]}); archives are never unpacked. Upload {wanted} and its config "
            "as plain files.",
        )
    if noun == "adapter" and (BASE_WEIGHTS in by_name or any(SHARD.match(name) for name in names)):
        return ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} holds a whole model ({BASE_WEIGHTS}), not a LoRA adapter; save the peft model with "
            "save_pretrained() without merging it.",
        )
    if noun == "model" and ADAPTER_WEIGHTS in by_name:
        return ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} holds a LoRA adapter, not a whole model; name it in a LoraAdapter, and the model it was trained "
            "on in the BaseModel.",
        )
    if other := [name for name in names if name.endswith((".safetensors", ".gguf"))]:
        return ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} holds {other[0]} but no {wanted}; upload the {noun} under that name as save_pretrained() "
            "writes it.",
        )
    return ArtifactError(
        FailureReason.SOURCE_NOT_FOUND,
        f"{where} holds no {wanted} ({len(names)} other files); check the source's path and upload what "
        "save_pretrained() writes.",
    )
