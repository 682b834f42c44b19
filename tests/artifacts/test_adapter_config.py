"""adapter_config.json is read in one way for verdict and runtime: what is refused, which modules are named."""

from __future__ import annotations

import json
import time

import pytest
from artifacts import zoo

from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import parse_adapter_config
from lorapool_artifacts.errors import ArtifactError

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, ("DoRA", "use_dora=False")),
        ({"lora_bias": True}, ("biases", "lora_bias=False")),
        ({"target_parameters": ["x"]}, ("bare parameters", "target_modules only")),
        ({"modules_to_save": ["lm_head"]}, ("again without modules_to_save",)),
        ({"layer_replication": [[0, 1]]}, ("again without layer_replication",)),
        ({"bias": None}, ('bias="none"',)),
        ({"init_lora_weights": ["pissa"]}, ("init_lora_weights", "convert")),
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


def test_an_expression_that_would_run_for_hours_is_not_run() -> None:
    config = parse_adapter_config(zoo.adapter_config(target_modules="(.*.*.*)*z"))
    started_s = time.monotonic()
    assert config.targets(Q0) is None
    assert time.monotonic() - started_s < 0.5


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": "All-Linear"}, True),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, False),
        ({"target_modules": "all-linear", "exclude_modules": ".*q_proj"}, None),
        ({"target_modules": ["up_proj"], "exclude_modules": ".*q_proj"}, False),
        ({"target_modules": ".*q_proj"}, None),
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
