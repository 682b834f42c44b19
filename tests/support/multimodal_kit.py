"""Tiny bases whose names on disk differ from those of the loaded model, as transformers saves and loads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_kit import COMMON

_COMMON: dict[str, Any] = {**COMMON, "bos_token_id": 1}


def tiny_gemma3() -> Any:
    """Gemma 3 with a vision tower, the same at every call. Tied weights would make it repeat the last token."""
    import transformers

    text = transformers.Gemma3TextConfig(
        **_COMMON,
        head_dim=16,
        sliding_window=6,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        eos_token_id=2,
        boi_token_index=300,
        eoi_token_index=301,
        image_token_index=302,
        tie_word_embeddings=False,
    )
    torch.manual_seed(11)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@dataclass(frozen=True)
class Saved:
    folder: Path
    model: Any


def glm_with_extra_layers(folder: Path) -> Saved:
    """GLM-4 MoE whose files have one more layer, of the kind that predicts several tokens at a time."""
    import transformers
    from safetensors.torch import load_file, save_file

    config = transformers.Glm4MoeConfig(
        **_COMMON,
        head_dim=16,
        partial_rotary_factor=1.0,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    torch.manual_seed(11)
    model = transformers.Glm4MoeForCausalLM(config).eval()
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    save_file(tensors, weights, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    return Saved(folder, model)


def llama_without_prefix(folder: Path, model: Any) -> Path:
    """A copy of a Llama as AutoModel saves it: `layers.0…` on disk is `model.layers.0…` when loaded."""
    from transformers import AutoModel

    model.save_pretrained(folder / "whole")
    AutoModel.from_pretrained(folder / "whole", dtype=torch.float32).save_pretrained(folder / "bare")
    config = folder / "bare" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
    return folder / "bare"
