"""Each cause of a refusal is provoked once, and its message has the cause's own sentence and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import artifact_zoo as zoo
import pytest

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.causes import CAUSES, Cause
from lorapool_artifacts.examine import examine_adapter
from lorapool_artifacts.settings import AdapterLimits
from lorapool_artifacts.sources.folder import FolderSource

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GOOD = zoo.adapter_files()
Files = dict[str, bytes]


def settings(**config: object) -> Files:
    return zoo.adapter_files(**config)


def tensors(**more: tuple[str, tuple[int, ...]]) -> Files:
    """An adapter with more tensors; a name of `more` stands for a dotted one."""
    return zoo.adapter_files(
        tensors={**zoo.adapter_tensors(), **{name.replace("__", "."): t for name, t in more.items()}}
    )


def one(name: str, *shape: int) -> Files:
    return zoo.adapter_files(tensors={**zoo.adapter_tensors(), name: ("BF16", shape)})


def pair(module: str, out_features: int = 16, rank: int = 4) -> Files:
    extra: zoo.Tensors = {
        f"base_model.model.{module}.lora_A.weight": ("BF16", (rank, 16)),
        f"base_model.model.{module}.lora_B.weight": ("BF16", (out_features, rank)),
    }
    names = ["q_proj", "v_proj", module.rpartition(".")[2]]
    return zoo.adapter_files(tensors={**zoo.adapter_tensors(), **extra}, target_modules=names)


def without(*names: str) -> Files:
    return zoo.adapter_files(tensors={n: t for n, t in zoo.adapter_tensors().items() if n not in names})


def nested(prefix: str, files: Files) -> Files:
    return {f"{prefix}/{name}": data for name, data in files.items()}


PROVOKED: dict[str, Files] = {
    "pickle": {"adapter_model.bin": b"x", "training_args.bin": b"x"},
    "archive": {"adapter.tar.gz": b"x"},
    "sub-folder": {"training_args.bin": b"x", "optimizer.pt": b"x", **nested("checkpoint-500", GOOD)},
    "sharded-training-state": {"global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt": b"x"},
    "sharded-weights": {CONFIG: GOOD[CONFIG], "adapter_model-00001-of-00002.safetensors": b"x"},
    "mlx": {CONFIG: b"{}", "adapters.safetensors": b"x", "0000100_adapters.safetensors": b"x"},
    "whole-model": {"config.json": b"{}", "model.safetensors": b"x"},
    "other-name": {"lora.safetensors": b"x"},
    "no-weights": {"README.md": b"x", "training_args.bin": b"x", "rng_state_0.pth": b"x"},
    "no-config": {WEIGHTS: GOOD[WEIGHTS]},
    "damaged": {**GOOD, WEIGHTS: GOOD[WEIGHTS][:-1]},
    "element-type": {**GOOD, WEIGHTS: zoo.safetensors({"a": ("I64", (2,))})},
    "config-not-json": {**GOOD, CONFIG: b"{"},
    "config-too-long": {**GOOD, CONFIG: b" " * 5_000_000},
    "code": settings(auto_map={"AutoModel": "x.Y"}),
    "mlx-config": {**GOOD, CONFIG: b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}'},
    "other-kind": settings(peft_type="IA3"),
    "setting": settings(use_dora=True),
    "unknown-setting": settings(from_the_future=16),
    "initialization": settings(init_lora_weights="pissa"),
    "trained-bias": settings(bias="all"),
    "classifier": settings(task_type="SEQ_CLS", modules_to_save=["score"]),
    "no-scale": settings(lora_alpha=0),
    "bad-value": settings(r="8"),
    "bad-expression": settings(target_modules="("),
    "expression": settings(rank_pattern={"(?!q)": 4}),
    "no-targets": settings(target_modules=[]),
    "empty-tensors": one(f"{Q0}.lora_B.weight", 0),
    "several-adapters": one(f"{Q0}.lora_A.second.weight", 4, 16),
    "mlx-names": one("model.layers.0.self_attn.k_proj.lora_a", 16, 4),
    "dora": one(f"{Q0}.lora_magnitude_vector", 16),
    "kasa": one(f"{Q0}.lora_diag", 4),
    "monteclora": one(f"{Q0}.lora_monteclora_sampler", 4),
    "trained-tokens": one("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 4),
    "value-head": one("v_head.summary.weight", 1, 16),
    "output-head": one("base_model.model.score.weight", 3, 16),
    "trained-module": one("base_model.model.model.norm.weight", 16),
    "tensor-bias": one(f"{Q0}.bias", 16),
    "surplus-tensor": one("surplus", 16),
    "half-a-pair": without(f"{Q0}.lora_A.weight"),
    "not-matrices": one(f"{Q0}.lora_B.weight", 64),
    "unequal-ranks": one(f"{Q0}.lora_B.weight", 16, 2),
    "other-rank": settings(r=8),
    "rank-too-high": zoo.adapter_files(tensors=zoo.adapter_tensors(rank=16), r=16),
    "embedding": pair("model.wte"),
    "head": pair("embed_out"),
    "experts": pair("model.layers.0.mlp.experts.3.gate_proj"),
    "some-experts": pair("layers.0.experts.3.w1", 32),
    "wrong-base": zoo.adapter_files(tensors=zoo.adapter_tensors(layers=range(3))),
    "unknown-modules": pair("model.layers.0.self_attn.qq_proj"),
    "untargeted": zoo.adapter_files(tensors=zoo.adapter_tensors(targets=("q_proj", "v_proj", "o_proj"))),
    "without-weights": zoo.adapter_files(tensors=zoo.adapter_tensors(layers=[1])),
    "changes-nothing": zoo.adapter_files(tensors={f"{Q0}.lora_velora_embed": ("BF16", (1,))}),
}  # fmt: skip
ELSEWHERE = {
    "adapter-for-a-base": "test_hf_source.py",
    "changed-copy": "test_adapted_modules.py",
    "link-out": "test_pvc_source.py",
    "too-many-tensors": "test_header.py",
    "too-large": "test_compatibility.py",
    "base-too-large": "test_resumed_fetch.py",
}
"""Causes that need another base, volume or bound, and the files that provoke them."""


def pattern_of(cause: Cause) -> re.Pattern[str]:
    """The cause's sentence and remedy, with anything in their fields."""
    whole = f"{cause.sentence}\x00{cause.remedy}"
    parts = [re.escape(part) for part in re.split(r"\{\w+\}", whole)]
    return re.compile(".*".join(parts).replace("\x00", ".*"), re.S)


@pytest.mark.parametrize("name", PROVOKED)
def test_each_cause_is_reported_with_its_own_remedy(name: str, tmp_path: Path) -> None:
    for file, data in zoo.base_files().items():
        (tmp_path / file).write_bytes(data)
    base = zoo.base_facts()
    folder = tmp_path / "adapter"
    for file, data in PROVOKED[name].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    findings = examine_adapter(FolderSource.open(folder), base, AdapterLimits(8)).findings
    pattern = pattern_of(CAUSES[name])
    found = [finding for finding in findings if pattern.fullmatch(finding.message)]
    assert [finding.reason for finding in found] == [CAUSES[name].reason], findings
    assert len(found[0].message) < 900


def test_every_cause_is_provoked_by_a_test() -> None:
    assert PROVOKED.keys() | ELSEWHERE.keys() == CAUSES.keys()


@pytest.mark.parametrize("name", CAUSES)
def test_a_remedy_is_a_whole_sentence_that_says_what_to_do(name: str) -> None:
    cause = CAUSES[name]
    assert re.match(r"[A-Z{].*", cause.remedy)
    assert cause.remedy.endswith((".", "{example}", "{remedy}"))
    assert not cause.sentence.endswith(".")
    assert isinstance(cause.reason, FailureReason)
