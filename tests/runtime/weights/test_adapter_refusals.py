"""Adapters of every other kind that peft saves: each refused by its own reason, with a remedy, by the runtime and from
the headers alone; nothing of them is loaded."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import tiny_model

from lorapool_api.base_modules import compact
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import inspect_adapter_folder
from lorapool_artifacts.settings import AdapterLimits
from lorapool_runtime.engines.errors import UnsupportedBaseError
from lorapool_runtime.engines.torch.model.load import load_base
from lorapool_runtime.weights.reader import AdapterReader

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QV = ["q_proj", "v_proj"]


class Base:
    """A tiny model with its folder and the layers that LoRA may target."""

    def __init__(self, folder: Path, architecture: str, **changes: Any) -> None:
        self.model, self.folder = tiny_model(architecture, **changes), folder / "base"
        self.model.save_pretrained(self.folder)
        base = load_base(str(self.folder), dtype="float32", device=torch.device("cpu"))
        self.reader = AdapterReader(base.groups, "float32", BaseFacts.of(base.modules), base.originals)
        self.published = BaseFacts.published(compact(base.modules))

    def words_about(self, folder: Path) -> tuple[str, str]:
        """The refusals of the runtime and of the operator, which only reads the headers."""
        with pytest.raises(ArtifactError) as runtime:
            self.reader.read(folder, max_rank=16)
        try:
            result = inspect_adapter_folder(folder, self.published, AdapterLimits(16)).compatibility
        except ArtifactError as error:
            return runtime.value.message, error.message
        assert not result.ok, "accepted from the headers"
        return runtime.value.message, result.message


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("llama"), "Llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("mixture"), "Qwen3Moe")


def saved(folder: Path, model: Any, config: Any) -> Path:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(copy.deepcopy(model), config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, ("DoRA", "use_dora=False")),
        ({"lora_bias": True}, ("trained biases", "lora_bias=False")),
        ({"bias": "lora_only"}, ("biases of the base", 'bias="none"')),
        ({"trainable_token_indices": [1, 2]}, ("trained tokens", "without trainable_token_indices")),
        ({"kasa_config": {}}, ("KaSA", "base's weights", "without KaSA")),
        ({"monteclora_config": {}}, ("samples its weights", "without monteclora_config")),
        ({"use_bdlora": {"target_modules_bd_b": QV, "nblocks": 2}}, ("block-diagonal", "without use_bdlora")),
        ({"alora_invocation_tokens": [1, 2]}, ("after its invocation", "without alora_invocation_tokens")),
        ({"layer_replication": [[0, 2], [1, 2]]}, ("replicated layers", "without layer_replication")),
        ({"init_lora_weights": "pissa"}, ("into the adapter", "path_initial_model_for_weight_conversion")),
        ({"init_lora_weights": "olora"}, ("into the adapter", "path_initial_model_for_weight_conversion")),
    ],
)
def test_each_lora_that_is_not_plain_lora_is_refused_by_its_own_reason(
    llama: Base, settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    from peft import LoraConfig

    folder = saved(
        tmp_path, llama.model, LoraConfig(**{"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM"} | settings)
    )
    for message in llama.words_about(folder):
        for word in words:
            assert word in message


OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "IA3": (lambda p: p.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "scales"),
    "LOHA": (lambda p: p.LoHaConfig(r=4, target_modules=QV), "save_as_lora()"),
    "LOKR": (lambda p: p.LoKrConfig(r=4, target_modules=QV), "Kronecker"),
    "OFT": (lambda p: p.OFTConfig(oft_block_size=4, target_modules=QV), "rotates"),
    "VERA": (lambda p: p.VeraConfig(r=4, target_modules=["q_proj"]), "random bases"),
    "ADALORA": (lambda p: p.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=QV), "singular values"),
    "PROMPT_TUNING": (lambda p: p.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "into the prompt"),
    "PREFIX_TUNING": (lambda p: p.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "into the prompt"),
    "LN_TUNING": (
        lambda p: p.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        "normalisation",
    ),
    "TRAINABLE_TOKENS": (lambda p: p.TrainableTokensConfig(token_indices=[1, 2]), "embeddings"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_refusal_of_each_other_kind_says_how_it_differs_from_lora(kind: str, llama: Base, tmp_path: Path) -> None:
    import peft

    make, word = OTHERS[kind]
    for message in llama.words_about(saved(tmp_path, llama.model, make(peft))):
        assert kind in message
        assert word in message
        assert "LoraConfig" in message


def test_an_adapter_with_matrices_for_some_experts_only_is_refused_with_their_number(
    mixture: Base, tmp_path: Path
) -> None:
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path, mixture.model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name in list(tensors):
        old = name.replace("self_attn.q_proj", "mlp.experts.3.gate_proj")
        tensors[old] = torch.zeros(32 if "lora_B" in name else 2, 2 if "lora_B" in name else 64)
    save_file(tensors, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "gate_proj"]}))
    for message in mixture.words_about(folder):
        assert "model.layers.0.mlp.experts.gate_proj has weights for 1 of 4 experts" in message
        assert "one and the same save_pretrained()" in message


def test_a_base_without_layers_that_lora_could_target_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    config.bos_token_id = config.eos_token_id = 2
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match="no linear layers that LoRA could target"):
        load_base(str(tmp_path), dtype="float32", device=torch.device("cpu"))
