"""adapter_config.json: which settings are refused and which modules the others name."""

from __future__ import annotations

import json

import artifact_zoo as zoo
import pytest

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.adapter_config import parse_adapter_config, read_adapter_config
from lorapool_artifacts.errors import ArtifactError

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, ("DoRA", "use_dora=False")),
        ({"lora_bias": True}, ("biases", "lora_bias=False")),
        ({"layer_replication": [[0, 1]]}, ("again without layer_replication",)),
        ({"enable_lora": [True, False, True]}, ("fused layer", "current version of peft")),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, ("classifier", 'task_type="CAUSAL_LM"')),
        ({"lora_alpha": 0}, ("lora_alpha is 0", "trained with")),
        ({"bias": None}, ('bias="none"',)),
        ({"init_lora_weights": ["pissa"]}, ("init_lora_weights", "is unknown")),
        ({"init_lora_weights": "pissa_niter_16"}, ("into the adapter", "Convert")),
        ({"init_lora_weights": "loftq"}, ("quantized copy", "init_lora_weights=True")),
        ({"init_lora_weights": "a_new_one"}, ("a_new_one", "init_lora_weights=True")),
        ({"peft_type": "LOHA"}, ("LOHA", "two low-rank products", "save_as_lora")),
        ({"peft_type": "PREFIX_TUNING"}, ("prompt", "LoraConfig")),
        ({"peft_type": ["LORA"]}, ("only LoRA",)),
        ({"lora_alpha": None}, ("lora_alpha",)),
        ({"r": 8.5}, ("r:",)),
    ],
)
def test_what_is_refused_names_the_setting_and_the_remedy(config: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_adapter_config(zoo.adapter_config(**config))
    assert caught.value.reason is FailureReason.INCOMPATIBLE
    for word in words:
        assert word in caught.value.message


def test_the_scale_is_never_guessed() -> None:
    settings = json.loads(zoo.adapter_config())
    del settings["lora_alpha"]
    with pytest.raises(ArtifactError, match="lora_alpha"):
        parse_adapter_config(json.dumps(settings).encode())


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("expression", ["(", "a{99999999999}"])
def test_an_expression_that_is_none_is_corrupt(field: str, expression: str) -> None:
    with pytest.raises(ArtifactError, match="bad regular expression") as caught:
        parse_adapter_config(zoo.adapter_config(**{field: expression}))
    assert caught.value.reason is FailureReason.CORRUPT_ARTIFACT
    assert field in caught.value.message


@pytest.mark.parametrize("expression", ["x" * 70_000, r"^(?!.*(?:visual|vision_tower)).*(?:q_proj|v_proj).*"])
def test_an_expression_that_is_too_long_or_looks_ahead_leaves_the_decision_to_the_tensors(expression: str) -> None:
    assert parse_adapter_config(zoo.adapter_config(target_modules=expression)).targets(Q0) is None


def test_an_expression_that_holds_others_for_hours_is_matched() -> None:
    assert parse_adapter_config(zoo.adapter_config(target_modules="(.*.*.*)*z")).targets(Q0) is False


def test_an_old_config_with_null_and_float_for_what_has_its_default_is_read() -> None:
    """Such as peft#1087 and LlamaFactory#5348."""
    config = parse_adapter_config(
        zoo.adapter_config(
            r=4.0, lora_alpha=16.0, enable_lora=None, merge_weights=True, fan_in_fan_out=True, use_rslora=None,
            rank_pattern=None, alpha_pattern=None, layers_to_transform=None, unsloth_version="2026.1",
        )
    )  # fmt: skip
    assert (config.r, config.scaling_of(Q0), config.targets(Q0)) == (4, 4.0, True)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": "All-Linear"}, True),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, False),
        ({"target_modules": "all-linear", "exclude_modules": ".*q_proj"}, False),
        ({"target_modules": "all-linear", "exclude_modules": r"(?!model).*"}, None),
        ({"target_modules": ["up_proj"], "exclude_modules": ".*q_proj"}, False),
        ({"target_modules": ".*q_proj"}, True),
        ({"target_modules": ".*[kv]_proj"}, False),
        ({"target_modules": r"(?!lm_head).*q_proj"}, None),
        ({"target_modules": r"(?!lm_head).*q_proj", "exclude_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, False),
        ({"target_modules": [Q0], "layers_to_transform": [1]}, True),
    ],
)
def test_whether_a_module_is_named_or_only_an_expression_could_tell(
    config: dict[str, object], named: bool | None
) -> None:
    assert parse_adapter_config(zoo.adapter_config(**config)).targets(Q0) is named


def test_a_config_that_is_too_long_is_not_called_damaged() -> None:
    raw = zoo.adapter_config(target_modules=[f"model.layers.{n}.self_attn.q_proj" for n in range(120_000)])
    with pytest.raises(ArtifactError, match="a bound of Lorapool's own") as caught:
        parse_adapter_config(raw)
    assert caught.value.reason is FailureReason.TOO_LARGE


def test_every_layer_of_36_864_experts_can_be_named_in_full() -> None:
    names = [f"model.layers.{n // 384}.mlp.experts.{n % 384 // 3}.gate_proj" for n in range(36_864)]
    assert parse_adapter_config(zoo.adapter_config(target_modules=names)).targets(names[-1]) is True


def test_every_reason_to_refuse_a_config_is_found_at_once() -> None:
    raw = zoo.adapter_config(use_dora=True, bias="all", from_the_future=1, rank_pattern={"(?!q)": 4}, r=8)
    config, problems = read_adapter_config(raw)
    assert config is None, "nothing is computed with a pattern that cannot be matched"
    found = " ".join(problem.message for problem in problems)
    assert [word for word in ("use_dora", "bias", "from_the_future", "rank_pattern") if word not in found] == []
    assert len(problems) == 4


def test_the_first_pattern_that_matches_decides_whether_name_or_expression() -> None:
    config = parse_adapter_config(
        zoo.adapter_config(r=8, rank_pattern={r"layers\.[01]\..*": 2, "q_proj": 4, "(k|v)_proj": 6, "^v_proj": 7})
    )
    asked = ("model.layers.0.self_attn.q_proj", "layers.2.q_proj", "layers.3.v_proj", "v_proj", "o_proj", "xq_proj")
    assert [config.rank_of(module) for module in asked] == [2, 4, 6, 6, 8, 8]
