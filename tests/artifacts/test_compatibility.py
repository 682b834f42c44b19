"""Adapters that fit a base are accepted; others are refused with a reason and a remedy."""

from __future__ import annotations

import artifact_zoo as zoo
import pytest

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.adapter_config import parse_adapter_config
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.checks.compatibility import (
    AdapterFacts,
    CompatibilityResult,
    all_findings,
    check_compatibility,
)
from lorapool_artifacts.checks.header import ADAPTER_BOUNDS, parse_header
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import AdapterLimits

LIMITS = AdapterLimits(max_rank=8, max_bytes=100_000)


def base(*, layers: int = zoo.LAYERS, hidden: int = zoo.HIDDEN) -> BaseFacts:
    return zoo.base_facts(layers=layers, hidden=hidden)


def checked(
    *,
    tensors: zoo.Tensors | None = None,
    on: BaseFacts | None = None,
    alone: bool = False,
    limits: AdapterLimits = LIMITS,
    **config: object,
) -> CompatibilityResult:
    raw = zoo.safetensors(zoo.adapter_tensors() if tensors is None else tensors)
    header = parse_header(raw, len(raw), ADAPTER_BOUNDS, name="a")
    facts = AdapterFacts(
        parse_adapter_config(zoo.adapter_config(**config)),
        {name: tensor.shape for name, tensor in header.tensors.items()},
        len(raw),
    )
    return check_compatibility(facts, None if alone else on or base(), limits)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def without(*names: str) -> zoo.Tensors:
    return {name: value for name, value in zoo.adapter_tensors().items() if name not in names}


def test_what_peft_saves_is_accepted() -> None:
    result = checked()
    assert result.ok
    assert (result.reason, result.rank, result.target_modules) == (None, 4, ("q_proj", "v_proj"))


def renamed(old: str, new: str) -> zoo.Tensors:
    return {name.replace(old, new): value for name, value in zoo.adapter_tensors().items()}


def plus(name: str, dtype: str, *shape: int) -> zoo.Tensors:
    return {**zoo.adapter_tensors(), name: (dtype, shape)}


HEAD: zoo.Tensors = {
    "base_model.model.lm_head.lora_A.weight": ("F32", (4, zoo.HIDDEN)),
    "base_model.model.lm_head.lora_B.weight": ("F32", (zoo.VOCAB, 4)),
}
EMBEDDING_B = "base_model.model.model.embed_tokens.lora_embedding_B"
HALF_AN_EMBEDDING: zoo.Tensors = {"base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (4, zoo.VOCAB))}
EMBEDDING: zoo.Tensors = {**HALF_AN_EMBEDDING, EMBEDDING_B: ("F32", (zoo.HIDDEN, 4))}
EXPERT: zoo.Tensors = {
    f"base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_{part}.weight": ("F32", shape)
    for part, shape in (("A", (4, 16)), ("B", (32, 4)))
}
INCOMPATIBLE, WRONG_BASE = FailureReason.INCOMPATIBLE, FailureReason.WRONG_BASE


@pytest.mark.parametrize(
    ("tensors", "config", "reason", "words"),
    [
        (without(f"{Q0}.lora_A.weight"), {}, INCOMPATIBLE, "no lora_A"),
        (without(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"), {}, INCOMPATIBLE, "targeted but has no weights"),
        (plus(f"{Q0}.lora_magnitude_vector", "F32", 16), {}, INCOMPATIBLE, "DoRA"),
        (plus(f"{Q0}.bias", "F32", 16), {}, INCOMPATIBLE, "bias"),
        (plus("surplus", "F32", 16), {}, INCOMPATIBLE, "not part of a LoRA"),
        (renamed("lora_A.weight", "lora_a"), {}, INCOMPATIBLE, "transpose each matrix"),
        (
            plus("base_model.model.model.layers.0.self_attn.q_proj.lora_A.two.weight", "F32", 4, 16),
            {},
            INCOMPATIBLE,
            "two adapters",
        ),
        (plus(f"{Q0}.lora_B.weight", "BF16", 0), {}, INCOMPATIBLE, "accelerator.get_state_dict(model)"),
        (plus("base_model.model.score.weight", "BF16", 3, 16), {}, INCOMPATIBLE, "classifier"),
        (plus("v_head.summary.weight", "BF16", 1, 16), {}, INCOMPATIBLE, "pretrained_model.save_pretrained"),
        (renamed("model.layers", "transformer.h"), {}, WRONG_BASE, "has no linear layer"),
        (
            {**zoo.adapter_tensors(), **renamed("q_proj", "qq_proj")},
            {"target_modules": ["q_proj", "v_proj", "qq_proj"]},
            INCOMPATIBLE,
            "qq_proj",
        ),
        (zoo.adapter_tensors(targets=("q_proj", "v_proj", "o_proj")), {}, INCOMPATIBLE, "not in target_modules"),
        (zoo.adapter_tensors(), {"r": 8}, INCOMPATIBLE, "adapter_config.json says 8"),
        (plus(f"{Q0}.lora_B.weight", "BF16", zoo.HIDDEN, 2), {}, INCOMPATIBLE, "rank 4"),
        (plus(f"{Q0}.lora_B.weight", "BF16", zoo.HIDDEN * 4), {}, INCOMPATIBLE, "not two-dimensional matrices"),
        (plus(f"{Q0}.lora_B.weight", "BF16", zoo.HIDDEN + 1, 4), {}, WRONG_BASE, "17x16"),
        (zoo.adapter_tensors(rank=16), {"r": 16}, FailureReason.RANK_TOO_HIGH, "maxRank"),
        (zoo.adapter_tensors(layers=range(3)), {}, WRONG_BASE, "layers.2"),
        (zoo.adapter_tensors(layers=range(1)), {}, INCOMPATIBLE, "layers.1"),
        (EXPERT, {"target_modules": ["up_proj"]}, INCOMPATIBLE, "peft targets the experts too"),
        (HALF_AN_EMBEDDING, {"target_modules": ["embed_tokens"]}, INCOMPATIBLE, "no lora_B"),
        ({**EMBEDDING, EMBEDDING_B: ("F32", (zoo.HIDDEN * 2, 4))}, {}, WRONG_BASE, "16x64"),
        (plus("base_model.model.model.embed_tokens.weight", "F32", zoo.VOCAB, 8), {}, WRONG_BASE, "base's width"),
    ],
)
def test_what_does_not_fit_has_its_reason_in_words(
    tensors: zoo.Tensors, config: dict[str, object], reason: FailureReason, words: str
) -> None:
    result = checked(tensors=tensors, **config)
    assert not result.ok
    assert (result.reason, words in result.message) == (reason, True), result
    assert len(result.message) < 900


@pytest.mark.parametrize(("tensors", "target"), [(HEAD, "lm_head"), (EMBEDDING, "embed_tokens")])
@pytest.mark.parametrize("alone", [False, True])
def test_lora_on_the_output_layer_and_the_embedding_is_accepted(tensors: zoo.Tensors, target: str, alone: bool) -> None:
    result = checked(tensors=tensors, alone=alone, target_modules=[target])
    assert (result.ok, result.target_modules) == (True, (target,)), result.message


@pytest.mark.parametrize("name", ["weight", "base_layer.weight", "modules_to_save.weight"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_copy_of_the_embedding_is_left_to_the_runtime_whatever_its_number_of_rows(name: str, alone: bool) -> None:
    tensors = plus(f"base_model.model.model.embed_tokens.{name}", "F32", zoo.VOCAB + 8, zoo.HIDDEN)
    result = checked(tensors=tensors, alone=alone)
    assert result.ok, result.message
    assert f"embed_tokens.{name}: a runtime compares the rows" in result.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", "_orig_mod.base_model.model."),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", ""),
        (".layers.0.", ".layers.0._fsdp_wrapped_module."),
        (".layers.1.", ".layers.1._checkpoint_wrapped_module."),
        (".weight", ".default.weight"),
    ],
)
def test_names_that_trainers_leave_in_tensors_are_understood(old: str, new: str) -> None:
    result = checked(tensors=renamed(old, new))
    assert result.ok, result.message
    assert (result.rank, result.target_modules) == (4, ("q_proj", "v_proj"))


def test_every_finding_is_reported_and_none_for_an_adapter_that_fits() -> None:
    def found(tensors: zoo.Tensors, **config: object) -> list[str]:
        shapes = {name: shape for name, (_, shape) in tensors.items()}
        facts = AdapterFacts(parse_adapter_config(zoo.adapter_config(**config)), shapes, 1)
        return [finding.message for finding in all_findings(facts, base(), LIMITS)]

    assert found(zoo.adapter_tensors()) == []
    several = {**zoo.adapter_tensors(rank=16), "surplus": ("F32", (1,)), f"{Q0}.lora_B.weight": ("BF16", (17, 16))}
    words = ("not part of a LoRA", "adapter_config.json says 4", "maxRank", "17x16")
    messages = found(several)
    assert len(messages) == len(words)
    for message, word in zip(messages, words, strict=True):
        assert word in message


def test_an_adapter_of_another_base_names_the_shapes_and_the_base_it_was_trained_on() -> None:
    result = checked(on=base(hidden=64), base_model_name_or_path="other/llama-7b")
    assert result.reason is FailureReason.WRONG_BASE
    assert "64x64 in the base but the adapter fits 16x16" in result.message
    assert "other/llama-7b" in result.message
    assert "and 1 more" in result.message


def test_another_name_of_a_base_with_the_same_shapes_is_only_a_hint() -> None:
    result = checked(base_model_name_or_path="/home/me/checkpoints/7")
    assert result.ok
    assert "/home/me/checkpoints/7" in result.message
    assert checked(base_model_name_or_path="/data/Llama/").message == checked().message


def test_too_many_bytes_are_too_large() -> None:
    found = checked(limits=AdapterLimits(8, max_bytes=10))
    assert found.reason is FailureReason.TOO_LARGE
    assert "raise LORAPOOL_MAX_ADAPTER_BYTES in the chart's artifacts.env" in found.message


def test_without_a_base_only_the_adapter_itself_is_checked() -> None:
    assert checked(alone=True).message.endswith("not checked against the base yet")
    assert checked(alone=True).ok
    assert checked(alone=True, tensors=without(f"{Q0}.lora_A.weight")).reason is FailureReason.INCOMPATIBLE
    assert checked(alone=True, limits=AdapterLimits(2, 100_000)).reason is FailureReason.RANK_TOO_HIGH


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (zoo.adapter_tensors(layers=[1]), {"layers_to_transform": [1]}),
        (zoo.adapter_tensors(layers=[1]), {"layers_to_transform": 1, "layers_pattern": "layers"}),
        (zoo.adapter_tensors(targets=("q_proj",)), {"target_modules": r".*\.q_proj"}),
        (zoo.adapter_tensors(targets=("q_proj",)), {"exclude_modules": ["v_proj"]}),
        (
            zoo.adapter_tensors(targets=[module.rpartition(".")[2] for module in zoo.MODULES]),
            {"target_modules": "all-linear"},
        ),
        (
            {**zoo.adapter_tensors(rank=4, targets=("q_proj",)), **zoo.adapter_tensors(rank=2, targets=("v_proj",))},
            {"rank_pattern": {"v_proj": 2}},
        ),
    ],
)
def test_the_ways_peft_narrows_its_targets_are_understood(tensors: zoo.Tensors, config: dict[str, object]) -> None:
    result = checked(tensors=tensors, **config)
    assert result.ok, result.message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "LoraConfig"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
        ({"lora_bias": True}, "biases"),
        ({"enable_lora": [True, False, True]}, "fused layer"),
        ({"layer_replication": [[0, 1]]}, "replicated"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"from_the_future": {"x": 1}}, "from_the_future"),
        ({"r": 0}, "r"),
        ({"r": "8"}, "r"),
        ({"r": True}, "r"),
        ({"lora_alpha": "NaN"}, "lora_alpha"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"rank_pattern": {"(?!q)": 4}}, "regular expression"),
        ({"alpha_pattern": {"(q": 4}}, "regular expression"),
        ({"alpha_pattern": {f"{n}[qv]_proj": 4 for n in range(257)}}, "more than 256"),
        ({"alpha_pattern": {"q_proj": 0}}, "positive"),
        ({"layers_pattern": "(x+)+"}, "regular expression"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(config: dict[str, object], words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_adapter_config(zoo.adapter_config(**config))
    assert caught.value.reason is FailureReason.INCOMPATIBLE
    assert words in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"from_the_future": None},
        {"another": False},
        {"auto_mapping": {"parent_library": "os"}},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": None},
        {"fan_in_fan_out": True},
    ],
)
def test_settings_without_effect_are_left_out(config: dict[str, object]) -> None:
    assert parse_adapter_config(zoo.adapter_config(**config)).r == 4


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'{"r": ' + b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_corrupt(raw: bytes) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_adapter_config(raw)
    assert caught.value.reason is FailureReason.CORRUPT_ARTIFACT


def test_rank_and_scaling_of_each_module_follow_the_patterns() -> None:
    config = parse_adapter_config(
        zoo.adapter_config(
            r=8,
            lora_alpha=16,
            rank_pattern={"q_proj": 4, "^model.layers.1.mlp.up_proj": 2},
            alpha_pattern={"q_proj": 32},
        )
    )
    assert config.scaling_of("model.layers.0.self_attn.v_proj") == 2.0
    assert config.scaling_of("model.layers.0.self_attn.q_proj") == 8.0
    assert (config.rank_of("model.layers.1.mlp.up_proj"), config.rank_of("x.model.layers.1.mlp.up_proj")) == (2, 8)
    stable = parse_adapter_config(zoo.adapter_config(r=16, lora_alpha=16, use_rslora=True))
    assert stable.scaling_of("q_proj") == 4.0
