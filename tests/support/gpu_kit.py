"""What a GPU's parts of the engine are tested with on a CPU: bases without values, and captures that capture "
"nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import tiny_model

from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.engines.torch.cuda_graphs import DecodeGraphs, Step
from lorapool_runtime.engines.torch.lora.kernel_gpu import TritonKernel
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base, load_base
from lorapool_runtime.weights.reader import PackedAdapter

META = torch.device("meta")
ADAPTERS: dict[str, dict[str, Any]] = {
    "everything": {"r": 5, "lora_alpha": 8, "target_modules": "all-linear"},
    "qv": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "output": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"]},
}


class NoCapture:
    """Replaces CudaCapture: a replay runs the step again."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, step: Step) -> Step:
        self.captured += 1
        return step


def core_of(folder: Path, **changes: Any) -> Core:
    settings: dict[str, Any] = {"max_rank": 16, "slots": 3, "max_batch": 5, "max_batch_tokens": 32, "max_model_len": 32}
    settings |= {"dtype": "float32", "device": "cpu", "kv_block_tokens": 4}
    return Core(EngineConfig(model_dir=str(folder), **settings | changes))


def read(core: Core, folder: Path) -> PackedAdapter:
    return core.reader.read(folder, max_rank=16)


def meta_graphs(folder: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    """A base without values: its weights, adapter slots and KV cache are on the meta device."""
    tiny_model(architecture).save_pretrained(folder)
    with monkeypatch.context() as patch:
        # the stock model's probe looks for packed sequences among its positions; the fitted one never asks
        patch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
        base: Base = load_base(str(folder), dtype="bfloat16", device=META)
    slots = AdapterSlots(base.groups, slots=4, max_rank=8, dtype=base.dtype, device=META, in_host_memory=False)
    base.lora.slots, base.lora.kernel = slots, TritonKernel(slots)
    layer = base.layers[0]
    pool = KVPool(
        layers=len(base.layers),
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        blocks=20,
        block_size=4,
        dtype=base.dtype,
        device=META,
    )
    return DecodeGraphs(base, pool, max_batch=6, max_model_len=64, capture=NoCapture())
