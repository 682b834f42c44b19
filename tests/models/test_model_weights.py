"""The committed adapters are bf16, small, as declared, as good as their scores, and described by their cards."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from cards import cards
from finetune_tasks import BASE_NAME, FINETUNES, SCORES, TASKS, Task, job_specs
from safetensors import safe_open

HIDDEN, KEYS, INNER, LAYERS = 576, 192, 1536, 30
# Module: (input width, output width) in the base model.
WIDTHS = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEYS),
    "v_proj": (HIDDEN, KEYS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INNER),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}
MAX_TOTAL_BYTES = 12_000_000
EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def config(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((task.folder / "adapter_config.json").read_text())
    return found


def scores() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCORES.read_text())
    return found


def modules(task: Task) -> list[str]:
    named: list[str] = job_specs()[task.name]["lora"].get("targetModules", [*WIDTHS])
    return sorted(named)


@EVERY_TASK
def test_the_config_is_what_its_job_asks_for(task: Task) -> None:
    found, rank = config(task), job_specs()[task.name]["lora"]["rank"]
    assert found["peft_type"] == "LORA"
    assert found["base_model_name_or_path"] == BASE_NAME
    assert (found["r"], found["lora_alpha"]) == (rank, 2 * rank)
    assert found["target_modules"] == modules(task)
    assert (found["bias"], found["use_dora"], found["modules_to_save"]) == ("none", False, None)


@EVERY_TASK
def test_the_weights_are_one_bf16_pair_per_module_and_layer(task: Task) -> None:
    with safe_open(task.folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        kinds = {file.get_slice(name).get_dtype() for name in shapes}
    wanted, rank = {}, config(task)["r"]
    for layer in config(task).get("layers_to_transform") or range(LAYERS):
        for module in modules(task):
            part = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            width_in, width_out = WIDTHS[module]
            wanted[f"{name}.lora_A.weight"] = (rank, width_in)
            wanted[f"{name}.lora_B.weight"] = (width_out, rank)
    assert shapes == wanted
    assert kinds == {"BF16"}


def test_together_they_are_small_and_of_ranks_4_8_and_16() -> None:
    sizes = [(task.folder / "adapter_model.safetensors").stat().st_size for task in TASKS.values()]
    assert sum(sizes) < MAX_TOTAL_BYTES
    assert {config(task)["r"] for task in TASKS.values()} == {4, 8, 16}
    assert len({tuple(modules(task)) for task in TASKS.values()}) >= 3


@EVERY_TASK
def test_the_scores_are_of_these_weights(task: Task) -> None:
    weights = (task.folder / "adapter_model.safetensors").read_bytes()
    assert scores()["tasks"][task.name]["weights_sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize(
    ("name", "measure", "at_least", "base_at_most"),
    [
        ("routing", "right", 0.85, 0.5),
        ("sentiment", "right", 0.85, 0.6),
        ("entities", "valid_json", 0.90, 0.3),
        ("entities", "right", 0.60, 0.2),
        ("translation", "chrf", 0.60, 0.3),
        ("manual-qa", "fact_recall", 0.60, 0.3),
    ],
)
def test_each_beats_the_base_by_a_wide_margin(name: str, measure: str, at_least: float, base_at_most: float) -> None:
    score = scores()["tasks"][name]
    assert score["finetune"][measure] >= at_least
    assert score["base"][measure] <= base_at_most


def test_the_cards_are_those_of_these_weights_and_scores() -> None:
    for name, text in cards().items():
        assert (FINETUNES / name).read_text(encoding="utf-8") == text, f"{name}: run hack/models/cards.py"
