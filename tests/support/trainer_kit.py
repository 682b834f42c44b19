"""Tiny bases with random weights, random examples, and a digest of what a job has trained."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from lorapool_trainer.engine import Engine, Example, Numerics, plan_cycle
from lorapool_trainer.engine.base import frozen_base

VOCABULARY = 96
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen2": Qwen2Config(**_SHAPE),
    "gemma2": Gemma2Config(**_SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=7),
    "mistral": MistralConfig(**_SHAPE, sliding_window=7),
}
"""Qwen2 has biases, Gemma 2 caps logits, Gemma 2 and Mistral have a window that is shorter than the examples."""

_STOCK_ATTENTION = {"gemma2": "eager"}


def tiny_model(name: str) -> Any:
    """A model with random weights, large enough that its outputs differ by token."""
    torch.manual_seed(3)
    attention = _STOCK_ATTENTION.get(name, "sdpa")
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def tiny_engine(name: str = "llama", *, numerics: Numerics = Numerics.EXACT, token_budget: int = 96) -> Engine:
    return Engine(frozen_base(tiny_model(name)), numerics, token_budget)


def random_examples(seed: int, count: int = 6, longest: int = 16, shortest: int = 3) -> list[Example]:
    """The second half of each example counts."""
    drawn = random.Random(seed)
    sizes = [drawn.randint(shortest, longest) for _ in range(count)]
    return [
        Example(tuple(drawn.randrange(VOCABULARY) for _ in range(n)), tuple(at >= n // 2 for at in range(n)))
        for n in sizes
    ]


def trained(engine: Engine, uids: Sequence[str]) -> dict[str, str]:
    """Trains the jobs to their end and returns the digests of their adapters."""
    while takes := plan_cycle([engine.offer(uid) for uid in uids], engine.token_budget):
        engine.run(takes)
    return {uid: digest(engine.adapter(uid)) for uid in uids}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
