"""A tiny base with a tokenizer of bytes, data files and jobs as YAML, for tests of sessions and of the command."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from fakes_runtime import save_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lorapool_trainer.jobs.live import LiveJob
from lorapool_trainer.jobs.order import JobOrder
from lorapool_trainer.local_files import LocalFiles
from lorapool_trainer.session import Session

Job = tuple[JobOrder, LocalFiles]
MakeJob = Callable[..., Job]

END = 257
WORDS = ("alpha", "bravo", "carol", "delta", "echo", "foxes")


def save_tiny_base(folder: Path) -> Path:
    """Two layers of random weights that know nothing, so that a few steps lower the loss."""
    save_byte_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=258,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 16, seed: int = 1, *, shuffled: bool = False) -> Path:
    """Answers repeat a word of the question; shuffled ones do not."""
    drawn = random.Random(seed)
    words = [drawn.choice(WORDS) for _ in range(count)]
    answers = drawn.sample(words, count) if shuffled else words
    lines = [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": answer}]}
        for word, answer in zip(words, answers, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job_object(name: str, data: Path | str, **spec: Any) -> dict[str, Any]:
    """A FineTuneJob; values of `spec` are merged into the sections that they name."""
    made: dict[str, Any] = {
        "baseModelRef": {"name": "tiny"},
        "data": {"training": {"uri": str(data)}, "validationFraction": "0.2"},
        "lora": {"rank": 4},
        "training": {"epochs": 4, "batchSize": 4, "learningRate": "1e-2", "maxTokens": 128},
    }
    for section, values in spec.items():
        made[section] = {**made.get(section, {}), **values} if isinstance(values, dict) else values
    return {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "team"},
        "spec": made,
    }


def write_job(folder: Path, name: str, data: Path | str, **spec: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job_object(name, data, **spec)))
    return path


def command(base: Path, out: Path, *jobs: Path, extra: tuple[str, ...] = ()) -> list[str]:
    named = [part for job in jobs for part in ("--job", str(job))]
    own = [sys.executable, "-m", "lorapool_trainer", "--model", str(base), "--out", str(out)]
    return [*own, "--tokens", "256", *named, *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run_command(base: Path, out: Path, *jobs: Path, extra: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(base, out, *jobs, extra=extra), capture_output=True, text=True, timeout=300, env=environment()
    )


def adapter_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def run_session(session: Session, until: Callable[[], bool] = lambda: False) -> dict[str, LiveJob]:
    while session.has_work and not until():
        if not session.work():
            session.wait_for_data(1.0)
    return session.jobs
