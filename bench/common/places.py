"""Where bench/ stores its files: everything below the git-ignored `.bench/`, except the committed results.

Adapters are random, in peft's own file format, on every target linear of the base. They are made once, as rank-16
float32 for W1 and as bfloat16 for the open loops (half the bytes on disk for hundreds of them).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.workloads import REQUESTS, adapter_name, mixed_name, mixed_rank

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
WORK = ROOT / ".bench"
LOGS = WORK / "logs"
RESULTS = BENCH / "results"


def newest_results() -> Path:
    """The last run's file: named by date, `<date>-<machine>.json`."""
    return max(RESULTS.glob("[0-9][0-9][0-9][0-9]-*.json"))


VOLUMES = WORK / "volumes"
W1_CLAIM = "w1"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_folder() -> Path:
    """SmolLM2-135M-Instruct in safetensors: LORAPOOL_BENCH_BASE, or the demo's (`make model`)."""
    if given := os.environ.get("LORAPOOL_BENCH_BASE"):
        return Path(given)
    command = [sys.executable, str(ROOT / "hack" / "models" / "base.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(done.stdout.splitlines()[-1])


def w1_adapters(base: Path) -> Path:
    """The folder of `a000` … (rank 16) and `m000` … (mixed ranks); made if it does not exist."""
    folder = VOLUMES / W1_CLAIM
    for number in range(REQUESTS):
        make_adapter(base, folder / adapter_name(number), number, 16)
        make_adapter(base, folder / mixed_name(number), 1000 + number, mixed_rank(number))
    return folder


def make_adapter(base: Path, folder: Path, seed: int, rank: int, dtype: str = "float32") -> None:
    """Writes an adapter under a temporary name and renames it, so that it is complete or absent."""
    if (folder / "adapter_model.safetensors").exists():
        return
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out_features, in_features) in linears(base).items():
        a = torch.randn((rank, in_features), generator=generator) / in_features**0.5
        b = torch.randn((out_features, rank), generator=generator) * 0.3 / rank**0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(getattr(torch, dtype))
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(getattr(torch, dtype))
    making = folder.with_name(f".{folder.name}.making-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    save_file(tensors, making / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "SmolLM2-135M-Instruct",
    }
    (making / "adapter_config.json").write_text(json.dumps(config))
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def linears(base: Path) -> Mapping[str, tuple[int, int]]:
    """Module name -> (out, in) of every linear that the adapters target."""
    from safetensors import safe_open

    found: dict[str, tuple[int, int]] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                module = name.removesuffix(".weight")
                if module.rpartition(".")[2] in TARGETS and name.endswith(".weight"):
                    out_features, in_features = tensors.get_slice(name).get_shape()
                    found[module] = (out_features, in_features)
    return found


def commit() -> str:
    """The measured commit, followed by `+` if anything but results has uncommitted changes."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = [line for line in _git("status", "--porcelain").splitlines() if "bench/results/" not in line]
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def key_of(**parts: Any) -> str:
    """A short name for a cached item; it changes with every part."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
