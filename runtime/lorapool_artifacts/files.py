"""Selects the files of an artifact from a source's listing: a fixed list per kind; no other file is ever fetched.

Pure. Sources that only hold pickles or archives are refused by file name, before a byte of them is read. Python files
are never selected, nor are files in sub folders: a folder is selected by naming it in the source. What training leaves
next to the weights (optimizer states, `training_args.bin`) decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lorapool_api.common import FailureReason, FileDigest, artifact_digest
from lorapool_artifacts.checks.causes import refusal
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
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
    "added_tokens.json",
)
CHAT_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, GENERATION_CONFIG)
"""What an adapter may bring besides its matrices."""
SHARD = re.compile(r"^model-(\d{5})-of-(\d{5})\.safetensors$")

MAX_FOLDERS = 5
"""Sub folders named in a message."""

_PICKLES = re.compile(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", re.IGNORECASE)
_TRAINING_STATE = re.compile(
    r"^(training_args|optimizer(_\d+)?|scheduler|scaler|rng_state(_\d+)?|random_states_\d+|custom_checkpoint_\d+)\."
)
_SPREAD_STATE = re.compile(r"(^|/)(.*_optim_states\.pt|zero_pp_rank_.*|.*\.distcp)$")
_ADAPTER_SHARD = re.compile(r"^adapter_model-\d{5}-of-\d{5}\.safetensors$")
_MLX_WEIGHTS = re.compile(r"^(\d+_)?adapters\.(safetensors|npz)$")
_ARCHIVES = re.compile(r"\.(tar|tgz|tbz2?|txz|zip|7z|rar|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_WEIGHTLIKE_PICKLES = re.compile(r"^(adapter_model|pytorch_model|model|consolidated|lora|weights)\b", re.IGNORECASE)


def select_files(kind: ArtifactKind, listing: Iterable[RemoteFile], *, where: str) -> tuple[RemoteFile, ...]:
    """The files of the artifact, sorted by name. Raises ArtifactError when the source holds no such artifact.

    Files in sub folders have their paths as names and are not selected; the error names folders that hold an artifact.
    """
    everything = {file.name: file for file in listing}
    names = _adapter_names(everything, where) if kind is ArtifactKind.ADAPTER else _base_names(everything, where)
    return tuple(everything[name] for name in sorted(names) if name in everything)


def digest_of(files: Sequence[RemoteFile]) -> str | None:
    """The artifact's digest, or None when the hash of a file is unknown."""
    known = [FileDigest(file.name, file.size_bytes, file.sha256) for file in files if file.sha256 is not None]
    return artifact_digest(known) if files and len(known) == len(files) else None


def files_of(expected_digest: str | None, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The files of an adapter that a digest identifies: all, or the weights and their config alone.

    A digest that was pinned or recorded when only these two were read keeps its meaning. All, if a hash is unknown.
    """
    weights = weights_of(files)
    return weights if expected_digest is not None and digest_of(weights) == expected_digest else tuple(files)


def weights_of(files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The weights of an adapter and their config, without what it brings for chats."""
    return tuple(file for file in files if file.name not in CHAT_FILES)


def _adapter_names(by_name: Mapping[str, RemoteFile], where: str) -> set[str]:
    if ADAPTER_WEIGHTS not in by_name:
        raise _without_weights(by_name, where, ADAPTER_WEIGHTS, "adapter")
    if ADAPTER_CONFIG not in by_name:
        raise refusal("no-config", where=where, wanted=ADAPTER_WEIGHTS)
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS, *CHAT_FILES}


def _base_names(by_name: Mapping[str, RemoteFile], where: str) -> set[str]:
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


def _check_shards(shards: set[str], by_name: Mapping[str, RemoteFile], where: str) -> None:
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


def _without_weights(everything: Mapping[str, RemoteFile], where: str, wanted: str, noun: str) -> ArtifactError:
    """The error of a source without weights; it names what the source holds instead and the remedy."""
    names = sorted(name for name in everything if "/" not in name)
    cause, found = _instead(names, everything, wanted, noun)
    if cause == "sub-folder":
        folders = _folders_with(wanted, everything)
        more = f" and {len(folders) - MAX_FOLDERS} more" if len(folders) > MAX_FOLDERS else ""
        listed = f"{', '.join(folders[:MAX_FOLDERS])}{more}"
        return refusal(cause, where=where, wanted=wanted, folders=listed, example=in_folder(where, folders[0]))
    return refusal(cause, where=where, wanted=wanted, noun=noun, file=found, count=len(names))


def _instead(names: Sequence[str], everything: Iterable[str], wanted: str, noun: str) -> tuple[str, str]:
    """The cause, a key of `causes`, and the file that shows it; weights come first, the state of a training last."""
    pickles = [name for name in names if _PICKLES.search(name) and not _TRAINING_STATE.match(name)]
    looks: list[tuple[str, Iterable[str]]] = [
        ("pickle", (name for name in pickles if _WEIGHTLIKE_PICKLES.match(name))),
        ("sharded-weights", filter(_ADAPTER_SHARD.match, names if noun == "adapter" else ())),
        ("mlx", filter(_MLX_WEIGHTS.match, names)),
        ("sub-folder", _folders_with(wanted, everything)),
        ("sharded-training-state", filter(_SPREAD_STATE.search, sorted(everything))),
        ("pickle", pickles),
        ("archive", filter(_ARCHIVES.search, names)),
        ("whole-model", (n for n in names if noun == "adapter" and (n == BASE_WEIGHTS or SHARD.match(n)))),
        ("adapter-for-a-base", (name for name in names if noun == "model" and name == ADAPTER_WEIGHTS)),
        ("other-name", (name for name in names if name.endswith((".safetensors", ".gguf")))),
    ]
    return next(((cause, file) for cause, files in looks for file in files), ("no-weights", ""))


def _folders_with(name: str, everything: Iterable[str]) -> list[str]:
    """The sub folders that hold a file of that name, the last checkpoint first."""
    found = [path.removesuffix(f"/{name}") for path in everything if path.endswith(f"/{name}")]
    return sorted(found, key=lambda folder: [int(part) for part in re.findall(r"\d+", folder)][:4], reverse=True)


def in_folder(where: str, folder: str) -> str:
    """A source's URI with a sub folder, which stands before a revision of hf:// and after a tag or digest of oci://."""
    if where.startswith("oci://"):
        repository, _, tag = where.rpartition("/")[2].partition(":")
        return f"{where if tag or '@' in repository else where + ':latest'}/{folder}"
    source, at, revision = where.partition("@")
    return f"{source.rstrip('/')}/{folder}{at}{revision}"
