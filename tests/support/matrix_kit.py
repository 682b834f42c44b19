"""Architectures × kinds of adapters for the engine's equality tests: made and saved by peft, and peft's own answers.

One base folder per architecture, one adapter folder per kind. The reference is peft reading the same folders on the
same base: a forward pass over a prompt and an answer gives, at every position, the token that peft would have chosen.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_kit import tiny_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Phi3": (("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    # the experts of a mixture are not linear layers, so adapters target its attention
    "Qwen3Moe": (ATTENTION, ()),
    "Mixtral": (ATTENTION, ()),
}
ARCHITECTURES = (
    "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3", "Phi3", "Olmo2", "Granite", "Qwen3Moe", "Mixtral",
)  # fmt: skip


OTHER_NAMES = "names of other trainers"


def kinds(architecture: str) -> dict[str, dict[str, Any]]:
    """Settings of peft's LoraConfig, by the feature that each one tests."""
    attention, mlp = PROJECTIONS.get(architecture, (ATTENTION, MLP))
    first, last, inner = attention[0], attention[-1], mlp or attention
    every: list[str] | str = "all-linear" if mlp else [*attention]  # peft counts a mixture's experts as linear
    return {
        "attention": {"r": 4, "lora_alpha": 8, "target_modules": list(attention)},
        "single projection": {"r": 8, "lora_alpha": 8, "target_modules": [first]},
        "all-linear": {"r": 16, "lora_alpha": 16, "target_modules": every},
        "rslora by expression": {
            "r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": rf".*\.({'|'.join(inner)})",
        },
        "patterns": {
            "r": 8, "target_modules": [first, inner[-1]],
            "rank_pattern": {f"layers.0.self_attn.{first}": 3, f"^model.layers.1.self_attn.{first}": 5},
            "alpha_pattern": {inner[-1]: 20},
        },
        "patterns by expression": {
            "r": 6, "lora_alpha": 6, "use_rslora": True, "target_modules": list({*attention, *inner}),
            "rank_pattern": {r"layers\.[1-9]\..*": 3}, "alpha_pattern": {rf"({first}|{last})": 12},
        },
        "one layer": {
            "r": 4, "target_modules": [*attention], "layers_to_transform": [1], "layers_pattern": "layers",
        },
        "another layer": {"r": 4, "target_modules": [last, *inner], "layers_to_transform": 0},
        "excluded": {"r": 4, "target_modules": every, "exclude_modules": [inner[-1]]},
        "excluded by expression": {"r": 4, "target_modules": [*inner], "exclude_modules": r".*\.layers\.0\..*"},
        "full names": {
            "r": 4, "target_modules": [f"model.layers.0.self_attn.{first}", f"model.layers.1.self_attn.{last}"],
        },
        "gaussian": {"r": 4, "target_modules": [first, last], "init_lora_weights": "gaussian"},
        "orthogonal": {"r": 4, "target_modules": [first, last], "init_lora_weights": "orthogonal"},
        "eva": {"r": 4, "target_modules": [first, last], "init_lora_weights": "eva"},
        "mica": {"r": 4, "target_modules": [first, last], "init_lora_weights": "mica"},
        "velora": {"r": 4, "target_modules": [first, last], "velora_config": {"num_groups": 8}},
        "expression that looks ahead": {
            "r": 4, "target_modules": rf"^(?!.*(?:visual{'|vision_tower' * 50})).*\.(?:{first}|{last})",
        },
        OTHER_NAMES: {"r": 4, "lora_alpha": 16, "target_modules": [last, inner[0]]},
        "pissa, converted": {"r": 2, "lora_alpha": 2, "target_modules": [first, last], "init_lora_weights": "pissa"},
    }  # fmt: skip


@dataclass(frozen=True)
class World:
    base: Path
    adapters: dict[str, Path]
    model: Any
    """A PeftModel with all adapters."""

    def choices(self, adapter: str | None, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """The tokens that peft chooses greedily after the prompt and after each token of the answer but the last."""
        return [int(token) for token in self.logits(adapter, [*prompt, *answer][:-1])[len(prompt) - 1 :].argmax(-1)]

    def logits(self, adapter: str | None, token_ids: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary]; None is the base alone."""
        with torch.inference_mode():
            if adapter is None:
                with self.model.disable_adapter():
                    return self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
            self.model.set_adapter(_label(adapter))
            return self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]


def matrix_world(folder: Path, architecture: str) -> World:
    from peft import PeftModel

    base = tiny_model(architecture)
    base.save_pretrained(folder / "base")
    adapters: dict[str, Path] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on newer transformers, and its advice on how to start training
        for number, (name, settings) in enumerate(kinds(architecture).items()):
            adapters[name] = _saved(folder / _label(name), base, settings, seed=100 + number)
        model: Any = None
        for name, place in adapters.items():
            if model is None:
                model = PeftModel.from_pretrained(base, place, adapter_name=_label(name))
            else:
                model.load_adapter(place, adapter_name=_label(name))
    _rename_as_other_trainers(adapters[OTHER_NAMES])
    return World(folder / "base", adapters, model.eval())


def _rename_as_other_trainers(folder: Path) -> None:
    """Writes the same adapter as torch.compile, checkpointing, FSDP and older versions of peft leave it."""
    from safetensors.torch import load_file, save_file

    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(
        {
            name.removeprefix("base_model.model.")
            .replace(".layers.0.", "._orig_mod.layers.0._checkpoint_wrapped_module.")
            .replace(".layers.1.", ".layers.1._fsdp_wrapped_module.")
            .replace(".weight", ".default.weight"): tensor
            for name, tensor in load_file(weights).items()
        },
        weights,
    )
    old = {"r": 4.0, "fan_in_fan_out": True, "merge_weights": True, "enable_lora": None, "rank_pattern": None}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | old))


def _saved(folder: Path, base: Any, settings: dict[str, Any], *, seed: int) -> Path:
    """An adapter with random weights, as its trainer would have saved it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(**{"lora_dropout": 0.1, "task_type": "CAUSAL_LM"} | settings)
    )
    start = settings.get("init_lora_weights")
    if start == "pissa":
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(folder / "start"))
        model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.add_(torch.randn_like(parameter) * 0.25)
    converted = {"path_initial_model_for_weight_conversion": str(folder / "start")} if start == "pissa" else {}
    model.save_pretrained(str(folder), **converted)
    return folder


def _label(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")
