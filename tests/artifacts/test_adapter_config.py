"""adapter_config.json: which settings are refused and which modules the others name."""

from __future__ import annotations

import json
import time

import artifact_zoo as zoo
import pytest

from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import parse_adapter_config
from lorapool_artifacts.errors import ArtifactError

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, ("DoRA", "use_dora=False")),
        ({"lora_bias": True}, ("biases", "lora_bias=False")),
        ({"layer_replication": [[0, 1]]}, ("again without layer_replication",)),
        ({"bias": None}, ('bias="none"',)),
        ({"init_lora_weights": ["pissa"]}, ("init_lora_weights", "is unknown")),
        ({"init_lora_weights": "pissa_niter_16"}, ("into the adapter", "convert")),
        ({"init_lora_weights": "loftq"}, ("quantized copy", "init_lora_weights=True")),
        ({"init_lora_weights": "a_new_one"}, ("a_new_one", "init_lora_weights=True")),
        ({"peft_type": "LOHA"}, ("LOHA", "two low-rank products", "save_as_lora")),
        ({"peft_type": "PREFIX_TUNING"}, ("prompt", "LoraConfig")),
        ({"peft_type": ["LORA"]}, ("only LoRA",)),
        ({"lora_alpha": None}, ("lora_alpha",)),
        ({"rank_pattern": None}, ("rank_pattern",)),
        ({"r": 8.0}, ("r:",)),
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
@pytest.mark.parametrize("expression", ["(", "a{99999999999}", "x" * 513])
def test_an_expression_that_is_none_is_corrupt(field: str, expression: str) -> None:
    with pytest.raises(ArtifactError, match="bad regular expression") as caught:
        parse_adapter_config(zoo.adapter_config(**{field: expression}))
    assert caught.value.reason is FailureReason.CORRUPT_ARTIFACT
    assert field in caught.value.message


def test_an_expression_that_holds_others_for_hours_is_matched_at_once() -> None:
    config = parse_adapter_config(zoo.adapter_config(target_modules="(.*.*.*)*z"))
    started_s = time.monotonic()
    assert config.targets(Q0) is False
    assert time.monotonic() - started_s < 0.5


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


def test_a_config_longer_than_a_mebibyte_is_corrupt() -> None:
    raw = zoo.adapter_config(rank_pattern={f"layers.{n}.q_proj": 4 for n in range(60_000)})
    with pytest.raises(ArtifactError, match="longer than 1048576") as caught:
        parse_adapter_config(raw)
    assert caught.value.reason is FailureReason.CORRUPT_ARTIFACT


def test_an_alpha_pattern_that_takes_too_long_is_refused_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_adapter_config(zoo.adapter_config(alpha_pattern={"(a|b|[cd])*q": 3}))
    monkeypatch.setattr("lorapool_artifacts.pattern.MAX_WORK", 0)
    with pytest.raises(ArtifactError, match="too long to match"):
        config.scaling_of("a.b.q_proj")


def test_the_first_pattern_that_matches_decides_whether_name_or_expression() -> None:
    config = parse_adapter_config(
        zoo.adapter_config(r=8, rank_pattern={r"layers\.[01]\..*": 2, "q_proj": 4, "(k|v)_proj": 6, "^v_proj": 7})
    )
    asked = ("model.layers.0.self_attn.q_proj", "layers.2.q_proj", "layers.3.v_proj", "v_proj", "o_proj", "xq_proj")
    assert [config.rank_of(module) for module in asked] == [2, 4, 6, 6, 8, 8]
