"""Adapters of the same config and shapes are validated once; any difference that matters is validated again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import save_adapter, tiny_model
from safetensors.torch import load_file, save_file

from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.weights import reader as adapter_file
from lorapool_runtime.weights.layout import Layout
from lorapool_runtime.weights.read_plan import ReadPlan, ReadPlanCache
from lorapool_runtime.weights.reader import AdapterReader, PackedAdapter
from lorapool_runtime.weights.targets import TargetGroup

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

GROUPS = tuple(
    TargetGroup(tuple(f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv"), 64, (64, 32, 32)) for i in range(2)
)
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


class Counted:
    """A reader, and how often it validated a file."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.validated = 0
        self._reader = AdapterReader(GROUPS, "float32")
        check = adapter_file.check_compatibility

        def counted(*given: Any) -> Any:
            self.validated += 1
            return check(*given)

        patch.setattr(adapter_file, "check_compatibility", counted)

    def read(self, folder: Path, max_rank: int = 8) -> PackedAdapter:
        return self._reader.read(folder, max_rank=max_rank)


@pytest.fixture
def reader() -> Iterator[Counted]:
    with pytest.MonkeyPatch.context() as patch:
        yield Counted(patch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(folder, tiny_model("Llama"), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return copied(saved, tmp_path / "first")


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shift(folder: Path, by: float) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor + by for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_a_second_adapter_of_the_same_config_and_shapes_is_not_validated_again_and_has_its_own_weights(
    folder: Path, tmp_path: Path, reader: Counted
) -> None:
    shift(folder, 0.0)
    other = copied(folder, tmp_path / "second")
    shift(other, 1.0)
    configure(other, target_modules=["v_proj", "q_proj"], base_model_name_or_path="some/where")
    one, two = reader.read(folder), reader.read(other)
    assert reader.validated == 1
    assert two.layout is one.layout
    piece = one.layout.linears[0]
    np.testing.assert_array_equal(piece.a(two.buffer), load_file(other / "adapter_model.safetensors")[A0].numpy())
    assert not np.array_equal(one.buffer, two.buffer)


def test_a_non_finite_weight_under_a_cached_plan_is_refused_by_its_module(folder: Path, reader: Counted) -> None:
    shift(folder, 0.0)
    reader.read(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[A0][3, 60] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.q_proj are not finite"):
        reader.read(folder)
    assert reader.validated == 1


@pytest.mark.parametrize("changes", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}])
def test_another_setting_is_validated_again(folder: Path, reader: Counted, changes: dict[str, Any]) -> None:
    before = reader.read(folder)
    configure(folder, **changes)
    after = reader.read(folder)
    assert reader.validated == 2
    assert not np.array_equal(before.buffer, after.buffer)


def test_a_refused_adapter_is_validated_and_refused_again(folder: Path, reader: Counted) -> None:
    configure(folder, target_modules=["q_proj"])
    for _ in range(2):
        with pytest.raises(ArtifactError, match="v_proj has weights but is not in target_modules"):
            reader.read(folder)
    assert reader.validated == 2


def test_a_lower_rank_limit_is_validated_again(folder: Path, reader: Counted) -> None:
    reader.read(folder, max_rank=4)
    with pytest.raises(ArtifactError, match="rank is 4"):
        reader.read(folder, max_rank=3)


@pytest.mark.parametrize("cut", [1, 64])
def test_a_known_header_in_a_file_of_another_length_is_corrupt(folder: Path, reader: Counted, cut: int) -> None:
    reader.read(folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ArtifactError, match="Upload the original file again"):
        reader.read(folder)


def test_only_the_plans_used_last_are_kept() -> None:
    def plan() -> ReadPlan:
        return ReadPlan(
            1, (), Layout((), 0, np.zeros((3, 0), np.int64)), np.zeros((0, 6), np.int64), np.zeros(0, np.float32), ()
        )

    plans = ReadPlanCache(max_plans=2)
    first = plans.get("first", plan)
    plans.get("second", plan)
    assert plans.get("first", plan) is first
    plans.get("third", plan)
    assert len(plans) == 2
    assert plans.get("first", plan) is first
