"""How much a step computes and the KV cache holds by default, on a CPU and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorapool_runtime import settings as module
from lorapool_runtime.accelerators import GPU_GIVEN, expects_gpu
from lorapool_runtime.engines.torch.kv_budget import chunk_attention_bytes, gpu_share
from lorapool_runtime.engines.torch.model.attention import LayerAttention
from lorapool_runtime.settings import RuntimeSettings, read_settings

GIB = 2**30


def batch(*flags: str, **environ: str) -> tuple[int, int]:
    settings: RuntimeSettings = read_settings(["--model", "/somewhere", *flags], environ)
    return settings.max_batch, settings.max_batch_tokens


def test_a_step_has_the_size_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "expects_gpu", lambda device: device == "cuda")
    assert batch() == batch("--device", "cpu") == (32, 512)
    assert batch("--device", "cuda") == (256, 2048)
    assert batch("--device", "cuda", "--max-batch", "8") == (8, 2048)
    assert batch("--device", "cpu", "--max-batch", "600") == (600, 600)
    assert batch("--max-batch-tokens", "64") == (32, 64)
    assert batch(LORAPOOL_RUNTIME_DEVICE="cuda", LORAPOOL_RUNTIME_MAX_BATCH_TOKENS="4096") == (256, 4096)


def test_a_gpu_is_expected_where_one_was_given_or_is_there(tmp_path: Path) -> None:
    node, absent = tmp_path / "nvidia0", tmp_path / "nothing"
    node.touch()
    assert [expects_gpu("auto", node=absent, environ={GPU_GIVEN: given}) for given in ("GPU-1", "all", "void", "")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert expects_gpu("auto", node=node, environ={})
    assert expects_gpu("cuda", node=absent, environ={})
    assert not expects_gpu("cpu", node=node, environ={GPU_GIVEN: "all"})


def test_the_cache_of_a_gpu_gets_most_of_what_the_largest_step_leaves() -> None:
    assert gpu_share(60 * GIB, 10 * GIB) == 45 * GIB
    assert gpu_share(GIB, 2 * GIB) < 0  # refused where the blocks are counted


def test_the_masks_of_a_chunk_behind_a_long_context_are_counted() -> None:
    llama = LayerAttention(kv_heads=8, head_dim=128, window=None, softcap=None)
    found = chunk_attention_bytes(llama, heads=32, tokens=2048, context=8192, itemsize=2)
    assert found == 2048 * 8192 * (1 + 2 + 4 * 2) + 2 * 8192 * 8 * 128 * 2
