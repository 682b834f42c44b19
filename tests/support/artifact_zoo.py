"""Adapters and bases made of plain bytes, valid ones and many kinds of invalid ones, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorapool_api.base_modules import BaseModule, ModuleKind
from lorapool_artifacts.checks.base_facts import BaseFacts

HIDDEN, INNER, KV, LAYERS, VOCAB, HEAD = 16, 32, 8, 2, 64, 4
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}

Tensors = dict[str, tuple[str, tuple[int, ...]]]

MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, metadata: dict[str, str] | None = None) -> bytes:
    """A well-formed file; values are a byte pattern, which is finite in every dtype used here."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return with_header(header, (bytes(range(31)) * (position // 31 + 1))[:position])


def with_header(header: Any, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def base_tensors(*, layers: int = LAYERS, hidden: int = HIDDEN) -> Tensors:
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", (VOCAB, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
        "lm_head.weight": ("BF16", (VOCAB, hidden)),
    }
    for layer in range(layers):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", (hidden,))
        for module, (out, in_) in MODULES.items():
            scale = hidden // HIDDEN
            tensors[f"model.layers.{layer}.{module}.weight"] = ("BF16", (out * scale, in_ * scale))
    return tensors


def base_facts(*, layers: int = LAYERS, hidden: int = HIDDEN) -> BaseFacts:
    """The facts of the base of `base_tensors`, as a runtime publishes them."""
    scale = hidden // HIDDEN
    linears = (
        BaseModule(f"model.layers.{layer}.{module}", out * scale, in_ * scale)
        for layer in range(layers)
        for module, (out, in_) in MODULES.items()
    )
    return BaseFacts.of(
        (
            *linears,
            BaseModule("layers.0.experts.gate_up_proj", 2 * INNER, hidden, ModuleKind.EXPERTS, 4, ("w1", "w3")),
            BaseModule("lm_head", VOCAB, hidden, ModuleKind.OUTPUT),
            BaseModule("model.embed_tokens", hidden, VOCAB, ModuleKind.EMBEDDING),
        ),
        "tiny/llama",
    )


def base_files(**changes: Any) -> dict[str, bytes]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": KV // HEAD,
        "head_dim": HEAD,
        "intermediate_size": INNER,
        "vocab_size": VOCAB,
        "_name_or_path": "tiny/llama",
    }
    return {
        "config.json": json.dumps({**config, **changes}).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "model.safetensors": safetensors(base_tensors()),
        "README.md": b"# a model card",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04never read",
    }


def sharded_base_files() -> dict[str, bytes]:
    files = base_files()
    del files["model.safetensors"]
    items = list(base_tensors().items())
    half = len(items) // 2
    files["model-00001-of-00002.safetensors"] = safetensors(dict(items[:half]))
    files["model-00002-of-00002.safetensors"] = safetensors(dict(items[half:]))
    files["model.safetensors.index.json"] = b'{"weight_map": {}}'
    return files


def adapter_config(**changes: Any) -> bytes:
    """adapter_config.json as peft 0.21 writes it."""
    config: dict[str, Any] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "tiny/llama", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05,
        "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
        "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
        "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"], "target_parameters": None,
        "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False, "velora_config": None,
    }  # fmt: skip
    return json.dumps({**config, **changes}).encode()


def adapter_tensors(
    *,
    rank: int = 4,
    targets: Iterable[str] = ("q_proj", "v_proj"),
    layers: Iterable[int] = range(LAYERS),
    dtype: str = "BF16",
) -> Tensors:
    tensors: Tensors = {}
    for layer in layers:
        for module, (out, in_) in MODULES.items():
            if module.rpartition(".")[2] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{prefix}.lora_A.weight"] = (dtype, (rank, in_))
                tensors[f"{prefix}.lora_B.weight"] = (dtype, (out, rank))
    return tensors


def adapter_files(*, tensors: Tensors | None = None, weights: bytes | None = None, **config: Any) -> dict[str, bytes]:
    return {
        "adapter_config.json": adapter_config(**config),
        "adapter_model.safetensors": weights or safetensors(adapter_tensors() if tensors is None else tensors),
        "README.md": b"# a fine-tune",
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
