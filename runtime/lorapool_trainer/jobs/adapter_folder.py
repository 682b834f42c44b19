"""The result of a job: a folder as peft saves it, which every server of LoRA adapters reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from lorapool_api.common import FileDigest, artifact_digest
from lorapool_trainer.engine import JobSettings, JobState
from lorapool_trainer.jobs.checkpoint import write_folder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    digest: str
    """`artifact_digest` of its files."""
    size_bytes: int


def adapter_of(state: JobState) -> dict[str, Tensor]:
    """The matrices of a job's state by their names in peft's file."""
    return {
        f"base_model.model.{name}.weight": tensor
        for name, tensor in state.tensors.items()
        if name.endswith((".lora_A", ".lora_B"))
    }


def write_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    settings: JobSettings,
    modules: Iterable[str],
    base: str,
    chat_files: Mapping[str, bytes],
) -> AdapterFolder:
    """`modules`: full names of the changed layers, or endings that match no other layer. `chat_files`: what else the
    folder holds, by name. The folder appears whole."""
    weights = safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)}, {"format": "pt"})
    files = {**chat_files, CONFIG: _config(settings, modules, base).encode(), WEIGHTS: weights}
    write_folder(path, files)
    digests = [FileDigest(name, len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in files.items()]
    return AdapterFolder(artifact_digest(digests), sum(map(len, files.values())))


def _config(settings: JobSettings, modules: Iterable[str], base: str) -> str:
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
