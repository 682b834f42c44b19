"""A folder becomes exactly what peft computes, or is refused with a reason and a remedy."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import save_adapter, tiny_model
from safetensors.torch import load_file, save_file

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.weights.reader import AdapterReader, PackedAdapter
from lorapool_runtime.weights.targets import TargetGroup

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LAYERS = range(2)
GROUPS = tuple(
    group
    for i in LAYERS
    for group in (
        TargetGroup(tuple(f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv"), 64, (64, 32, 32)),
        TargetGroup((f"model.layers.{i}.self_attn.o_proj",), 64, (64,)),
        TargetGroup(tuple(f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up")), 64, (96, 96)),
        TargetGroup((f"model.layers.{i}.mlp.down_proj",), 96, (64,)),
    )
)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(folder, tiny_model("Llama"), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


def read(folder: Path, dtype: str = "float32", max_rank: int = 8) -> PackedAdapter:
    return AdapterReader(GROUPS, dtype).read(folder, max_rank=max_rank)


def refused(folder: Path, reason: FailureReason, *words: str, dtype: str = "float32", max_rank: int = 8) -> None:
    """By `read` and by `check` alike."""
    reader = AdapterReader(GROUPS, dtype)
    for look_at in (reader.read, reader.check):
        with pytest.raises(ArtifactError) as caught:
            look_at(folder, max_rank=max_rank)
        assert caught.value.reason == reason
        for word in words:
            assert word in caught.value.message


def test_a_check_finds_what_a_read_finds_and_keeps_no_weights(folder: Path) -> None:
    reader = AdapterReader(GROUPS, "bfloat16")
    plan, adapter = reader.check(folder, max_rank=8), reader.read(folder, max_rank=8)
    assert (plan.rank, plan.target_modules, plan.layout) == (adapter.rank, adapter.target_modules, adapter.layout)
    assert plan.matrices[:, 5].any()  # the plan itself, which is cached, still says where each matrix goes


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweight(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


QKV0 = range(3)  # the numbers of layer 0's first three linears


def test_an_adapter_saved_by_peft_is_packed_with_its_scale(folder: Path) -> None:
    adapter = read(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (adapter.rank, adapter.target_modules) == (4, ("q_proj", "v_proj"))
    q, k, v = (adapter.layout.linears[i] for i in QKV0)
    np.testing.assert_array_equal(q.a(adapter.buffer), tensors[f"{Q0}.lora_A.weight"].numpy())
    np.testing.assert_array_equal(q.b(adapter.buffer), tensors[f"{Q0}.lora_B.weight"].numpy().T * 2)
    assert (q.rank, k.rank, v.rank) == (4, 0, 4)  # k is left alone
    assert sum(piece.rank for piece in adapter.layout.linears) == 4 * 4
    weights = sum(tensor.numel() * 4 for tensor in tensors.values())
    assert weights <= adapter.host_bytes == adapter.buffer.nbytes < weights + 64 * len(tensors)


def test_rslora_scales_by_the_root_of_the_rank(folder: Path) -> None:
    plain = read(folder)
    configure(folder, use_rslora=True)
    got, q = read(folder).buffer, plain.layout.linears[0]
    np.testing.assert_allclose(q.b(got), q.b(plain.buffer) * math.sqrt(4), rtol=1e-6)


def test_patterns_set_rank_and_alpha_of_single_layers(tmp_path: Path) -> None:
    made = save_adapter(
        tmp_path,
        tiny_model("Llama"),
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 12},
    )
    tensors, adapter = load_file(made / "adapter_model.safetensors"), read(made)
    q, _, v = (adapter.layout.linears[i] for i in QKV0)
    assert (q.rank, v.rank) == (2, 4)
    np.testing.assert_allclose(q.b(adapter.buffer), tensors[f"{Q0}.lora_B.weight"].numpy().T * 2)
    want = tensors[f"{Q0.replace('q_proj', 'v_proj')}.lora_B.weight"].numpy().T * 3
    np.testing.assert_allclose(v.b(adapter.buffer), want)


def test_bfloat16_is_rounded_to_nearest_even_like_torch(folder: Path) -> None:
    adapter = read(folder, dtype="bfloat16")
    want = load_file(folder / "adapter_model.safetensors")[f"{Q0}.lora_A.weight"].to(torch.bfloat16)
    got = torch.from_numpy(adapter.layout.linears[0].a(adapter.buffer)).view(torch.bfloat16)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_16_bit_types_are_read_exactly(folder: Path, dtype: torch.dtype) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    reweight(folder, halve)
    want = load_file(folder / "adapter_model.safetensors")[f"{Q0}.lora_A.weight"].float()
    adapter = read(folder)
    np.testing.assert_array_equal(adapter.layout.linears[0].a(adapter.buffer), want.numpy())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ("DoRA", "use_dora=False")),
        ({"bias": "lora_only"}, ("bias",)),
        ({"lora_bias": True}, ("lora_bias=False",)),
        ({"trainable_token_indices": [1]}, ("trainable_token_indices",)),
        ({"layer_replication": [[0, 1]]}, ("layer_replication",)),
        ({"peft_type": "IA3"}, ("IA3", "LoRA")),
        ({"init_lora_weights": "pissa"}, ("pissa", "Convert")),
        ({"a_future_option": 3}, ("a_future_option",)),
    ],
)
def test_each_kind_that_is_not_plain_lora_is_refused_with_its_own_reason(
    folder: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    configure(folder, **changes)
    refused(folder, FailureReason.INCOMPATIBLE, *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{Q0}.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embed_tokens has no lora_B"),
        ("base_model.model.score.weight", "the output layer of a classifier"),
        (f"{Q0}.something", "not part of a LoRA"),
    ],
)
def test_each_tensor_that_is_no_lora_weight_is_refused(folder: Path, name: str, words: str) -> None:
    reweight(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    refused(folder, FailureReason.INCOMPATIBLE, words)


def test_a_rank_above_the_limit_names_both(folder: Path) -> None:
    refused(folder, FailureReason.RANK_TOO_HIGH, "rank is 4", "r <= 2", max_rank=2)


def test_a_pickle_is_refused_and_never_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, FailureReason.UNSUPPORTED_FORMAT, "pickle", "safetensors")


def test_no_config_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    refused(folder, FailureReason.UNSUPPORTED_FORMAT, "adapter_config.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "LORA"}', '{"peft_type":"LORA","r":0}'])
def test_a_broken_config_is_corrupt(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        read(folder)
    assert caught.value.reason in {FailureReason.CORRUPT_ARTIFACT, FailureReason.INCOMPATIBLE}


def test_a_pattern_that_is_no_regular_expression_is_corrupt(folder: Path) -> None:
    configure(folder, target_modules="(")
    refused(folder, FailureReason.CORRUPT_ARTIFACT, "regular expression")


def test_an_expression_must_name_the_layers_the_file_holds(folder: Path) -> None:
    configure(folder, target_modules=r".*\.(q|v)_proj")
    assert read(folder).target_modules == ("q_proj", "v_proj")
    configure(folder, target_modules=r".*\.(q|k|v)_proj")
    refused(folder, FailureReason.INCOMPATIBLE, "k_proj is targeted but has no weights")
    configure(folder, target_modules="(.*.*.*)*z")  # would hold Python's own matcher for hours
    refused(folder, FailureReason.INCOMPATIBLE, "not in target_modules", "and 1 more")


def test_where_an_expression_cannot_be_matched_the_layers_are_those_the_file_holds(folder: Path) -> None:
    configure(folder, target_modules=r"(?!lm_head).*_proj")
    assert read(folder).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("keep", [0, 5, 60, -100, -1])
def test_a_truncated_file_is_corrupt(folder: Path, keep: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, FailureReason.CORRUPT_ARTIFACT)


def test_trailing_bytes_are_corrupt(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refused(folder, FailureReason.CORRUPT_ARTIFACT, "bytes")


def test_one_half_of_a_pair_missing_is_named(folder: Path) -> None:
    reweight(folder, lambda tensors: tensors.pop(f"{Q0}.lora_B.weight"))
    refused(folder, FailureReason.INCOMPATIBLE, "layers.0.self_attn.q_proj has no lora_B")


def test_a_whole_layer_missing_is_named(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            tensors.pop(f"{Q0}.lora_{side}.weight")

    reweight(folder, drop)
    refused(folder, FailureReason.INCOMPATIBLE, "model.layers.0.self_attn.q_proj is targeted but has no weights")


def test_weights_the_config_does_not_target_are_named(folder: Path) -> None:
    configure(folder, target_modules=["q_proj"])
    refused(folder, FailureReason.INCOMPATIBLE, "v_proj has weights but is not in target_modules")


def test_the_first_three_layers_that_the_base_lacks_are_named(tmp_path: Path) -> None:
    made = save_adapter(tmp_path, tiny_model("Llama", num_hidden_layers=6), r=2, target_modules=["q_proj"])
    refused(
        made,
        FailureReason.WRONG_BASE,
        "the base has no linear layer model.layers.2.self_attn.q_proj, its last layer is 1; "
        "the base has no linear layer model.layers.3.self_attn.q_proj; "
        "the base has no linear layer model.layers.4.self_attn.q_proj; and 1 more.",
        "baseModelRef",
    )


def test_modules_the_base_lacks_are_named_with_the_modules_it_has(tmp_path: Path) -> None:
    made = save_adapter(tmp_path, tiny_model("Phi3"), r=2, target_modules=["qkv_proj", "gate_up_proj"])
    refused(
        made,
        FailureReason.WRONG_BASE,
        "model.layers.0.mlp.gate_up_proj, only down_proj, gate_proj, up_proj there",
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.1.mlp.gate_up_proj; and 1 more.",
    )


def test_the_first_three_shapes_of_another_base_are_named(tmp_path: Path) -> None:
    made = save_adapter(
        tmp_path, tiny_model("Llama", hidden_size=32), r=2, target_modules=["q_proj", "down_proj", "up_proj"]
    )
    refused(
        made,
        FailureReason.WRONG_BASE,
        "model.layers.0.mlp.down_proj is 64x96 in the base but the adapter fits 32x96; "
        "model.layers.0.mlp.up_proj is 96x64 in the base but the adapter fits 96x32; "
        "model.layers.0.self_attn.q_proj is 64x64 in the base but the adapter fits 32x32; and 3 more.",
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e28, -2e6])
def test_numbers_that_are_not_finite_or_too_large_are_refused(folder: Path, bad: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.lora_A.weight"][1, 3] = bad

    reweight(folder, poison)
    refused(folder, FailureReason.NON_FINITE_WEIGHTS, "q_proj")


def test_values_that_overflow_in_the_bases_type_are_refused(folder: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.lora_B.weight"][0, 0] = 60_000.0  # times the scale of 2: above float16's largest

    reweight(folder, enlarge)
    refused(folder, FailureReason.NON_FINITE_WEIGHTS, "float16", dtype="float16")
    read(folder)


def test_an_element_type_that_is_not_read_is_named(folder: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})

    reweight(folder, widen)
    refused(folder, FailureReason.UNSUPPORTED_FORMAT, "F64")
