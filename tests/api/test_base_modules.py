"""The published list of a base's modules is small, and gives back every module."""

from __future__ import annotations

import pytest

from lorapool_api.base_modules import BaseModule, BaseModules, ModuleKind, compact, expand

LAYERS, EXPERTS = 48, 256


def linear(name: str, out: int = 64, *aliases: str) -> BaseModule:
    return BaseModule(name, out, 64, aliases=aliases)


def of_layers(layers: int) -> list[BaseModule]:
    return [
        linear(f"model.layers.{layer}.self_attn.{leaf}", out, f"layers.{layer}.self_attn.{leaf}")
        for layer in range(layers)
        for leaf, out in (("q_proj", 64), ("k_proj", 32))
    ]


def same(modules: list[BaseModule]) -> BaseModules:
    """Compacts them, and checks that they come back by way of JSON."""
    published = BaseModules.model_validate_json(compact(modules, "sha256:1").model_dump_json(by_alias=True))
    assert sorted(expand(published), key=lambda module: module.name) == sorted(modules, key=lambda module: module.name)
    return published


def test_layers_of_equal_shape_are_one_entry() -> None:
    published = same(of_layers(LAYERS))
    assert [(entry.name, entry.numbers) for entry in published.modules] == [
        ("model.layers.{}.self_attn.q_proj", ["0-47"]),
        ("model.layers.{}.self_attn.k_proj", ["0-47"]),
    ]


def test_ten_thousand_unfused_experts_take_a_few_hundred_bytes() -> None:
    modules = [
        linear(f"model.layers.{layer}.mlp.experts.{expert}.up_proj")
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    ]
    assert len(same(modules).model_dump_json()) < 400


def test_layers_that_differ_in_shape_or_lack_a_module_keep_their_own_numbers() -> None:
    odd = [linear(f"model.layers.{layer}.mlp.up_proj", 96 if layer in (3, 5, 6) else 64) for layer in range(8)]
    odd += [linear(f"model.layers.{layer}.mlp.gate_proj") for layer in (0, 2, 3, 7)]
    assert {(entry.out_features, *entry.numbers) for entry in same(odd).modules} == {
        (64, "0-2,4,7"),
        (96, "3,5-6"),
        (64, "0,2-3,7"),
    }


def test_a_grid_with_holes_is_split_into_full_grids() -> None:
    names = [(layer, expert) for layer in range(3) for expert in range(4) if (layer, expert) != (1, 2)]
    entries = same([linear(f"layers.{layer}.experts.{expert}.w1") for layer, expert in names]).modules
    assert sorted(entry.numbers for entry in entries) == [["0,2", "0-3"], ["1", "0-1,3"]]


def test_kinds_experts_parts_and_modules_without_numbers_come_back() -> None:
    same(
        [
            BaseModule("lm_head", 320, 64, ModuleKind.OUTPUT),
            BaseModule("model.embed_tokens", 64, 320, ModuleKind.EMBEDDING, aliases=("embed_tokens",)),
            BaseModule(
                "model.layers.0.mlp.experts.gate_up_proj", 96, 64, ModuleKind.EXPERTS, 8, ("gate_proj", "up_proj")
            ),
        ]
    )


def test_an_alias_with_other_numbers_is_left_out() -> None:
    published = compact([linear("model.layers.3.mlp.up_proj", 64, "blocks.7.mlp.up_proj", "layers.3.mlp.up_proj")])
    assert [module.aliases for module in expand(published)] == [("layers.3.mlp.up_proj",)]


def test_numbers_that_do_not_fit_the_name_are_an_error() -> None:
    broken = compact(of_layers(2)).modules[0].model_copy(update={"numbers": ["0-x"]})
    with pytest.raises(ValueError, match="x"):
        list(expand(BaseModules(modules=[broken])))
