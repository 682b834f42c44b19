"""Every name that peft accepts for a module leads to the module of the loaded base."""

from __future__ import annotations

import pytest

from lorapool_api.base_modules import BaseModule, ModuleKind
from lorapool_artifacts.checks.base_facts import BaseFacts, Place, place_of

EXPERTS = "model.layers.0.mlp.experts"
OLD = "model.layers.0.block_sparse_moe.experts"


def base() -> BaseFacts:
    return BaseFacts.of(
        (
            BaseModule("model.language_model.q_proj", 64, 32, aliases=("language_model.model.q_proj",)),
            BaseModule(
                f"{EXPERTS}.gate_up_proj", 96, 64, ModuleKind.EXPERTS, 4, ("w1", "w3"), (f"{OLD}.gate_up_proj",)
            ),
            BaseModule(f"{EXPERTS}.down_proj", 64, 48, ModuleKind.EXPERTS, 4, ("w2",), (f"{OLD}.down_proj",)),
        ),
        "acme/base",
    )


BOTH = ("mlp.experts.down_proj", "gate_up_proj")


@pytest.mark.parametrize("name", ["model.language_model.q_proj", "language_model.model.q_proj"])
def test_a_module_is_found_by_each_of_its_names(name: str) -> None:
    place = place_of(name, base(), ())
    assert place == Place("model.language_model.q_proj", name, ModuleKind.LINEAR, 64, 32)
    assert place_of("q_proj", base(), ()) is None


@pytest.mark.parametrize(
    ("name", "parameters", "found"),
    [
        (EXPERTS, BOTH, "down_proj"),
        (f"{EXPERTS}.base_layer", BOTH, "gate_up_proj"),
        (EXPERTS, ("gate_up_proj",), "gate_up_proj"),
        (OLD, ("gate_up_proj",), "gate_up_proj"),
        (f"{EXPERTS}.base_layer", ("gate_up_proj",), None),
        (EXPERTS, (), None),
    ],
)
def test_the_wrapped_parameter_is_found_by_pefts_order_of_wrapping(
    name: str, parameters: tuple[str, ...], found: str | None
) -> None:
    place = place_of(name, base(), parameters)
    assert (place and (place.module, place.experts, place.expert)) == (found and (f"{EXPERTS}.{found}", 4, None))


def test_one_expert_of_an_older_file_is_a_part_of_the_parameter() -> None:
    place = place_of(f"{OLD}.3.w3", base(), ())
    assert place == Place(f"{EXPERTS}.w3", f"{OLD}.3.w3", ModuleKind.EXPERTS, 48, 64, expert=3, of_experts=4)
    assert place_of(f"{OLD}.3.w2", base(), ()).module == f"{EXPERTS}.down_proj"  # type: ignore[union-attr]
    assert place_of(f"{OLD}.4.w3", base(), ()) is None, "the base has four experts"
