"""Adapters saved by the real peft: all its settings are known, its files are accepted and its scaling equals ours."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from lorapool_artifacts.checks.adapter_config import AdapterConfig, parse_adapter_config
from lorapool_artifacts.checks.peft_settings import (
    HARMLESS,
    INITIALIZATIONS,
    KINDS,
    LORA,
    REFUSED,
    REFUSED_INITIALIZATIONS,
)
from lorapool_artifacts.inspect import base_files_from_folder, inspect_adapter_folder
from lorapool_artifacts.loaded_base import facts_of
from lorapool_artifacts.settings import AdapterLimits

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LIMITS = AdapterLimits(max_rank=8, max_bytes=100_000)
OTHER_PROGRAMS = {"enable_lora", "merge_weights", "transformers_version", "unsloth_version"}
"""Settings of the first version of peft, and of other trainers."""

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def tiny_llama() -> Any:
    """A random Llama of a few thousand weights."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def test_every_setting_of_the_installed_peft_is_known() -> None:
    """New settings of a new peft must be classified before its adapters are accepted."""
    decides = set(AdapterConfig.model_fields) | {"bias", "init_lora_weights"}
    assert not decides & (HARMLESS.keys() | REFUSED.keys())
    assert not HARMLESS.keys() & REFUSED.keys()
    known = (decides | HARMLESS.keys() | REFUSED.keys()) - OTHER_PROGRAMS
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == known


def test_every_kind_of_adapter_of_the_installed_peft_has_its_own_words() -> None:
    assert {kind.value for kind in peft.PeftType} == KINDS.keys() | {LORA}


def test_every_start_that_the_installed_peft_documents_is_known() -> None:
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    named = {value for part in typing.get_args(hint) for value in typing.get_args(part)}
    assert named - {"pissa_niter_[number of iters]"} <= INITIALIZATIONS | REFUSED_INITIALIZATIONS.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "use_rslora": True},
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 5}},
        {"target_modules": r".*\.layers\.0\..*(q|k)_proj"},
    ],
)
def test_an_adapter_trained_with_the_real_peft_is_accepted_with_pefts_own_scaling(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    wrapped.save_pretrained(folder / "lora")
    seen = inspect_adapter_folder(folder / "lora", facts_of(base_files_from_folder(folder / "base")), LIMITS)
    assert seen.compatibility.ok, seen.compatibility.message
    config = parse_adapter_config((folder / "lora" / "adapter_config.json").read_bytes())
    scalings = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "scaling") and hasattr(layer, "lora_A")
    }
    assert scalings
    assert {name: config.scaling_of(name) for name in scalings} == pytest.approx(scalings)
