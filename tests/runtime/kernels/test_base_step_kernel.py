"""The base's native kernels equal torch's products and attention, and do not depend on the rest of the batch."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_kit import tiny_model
from torch import Tensor

from lorapool_runtime import native_library
from lorapool_runtime.engines.torch.kernels import base_step
from lorapool_runtime.engines.torch.kernels.base_step import (
    VERSION,
    BaseKernel,
    PagedDecode,
    PanelLinear,
    RowGate,
    RowNorm,
)
from lorapool_runtime.engines.torch.model.load import load_base
from lorapool_runtime.engines.torch.model.native_modules import NativeMLP, NativeNorm
from lorapool_runtime.native_library import NativeSettingError, NativeUnavailableError, open_library


@pytest.fixture(autouse=True)
def kernel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> BaseKernel:
    """The built library if it is as new as its sources, else one that is built here."""
    built = native_library.FOLDER / "libbase_step.so"
    root = Path(__file__).parents[3] / "runtime"
    sources = [*(root / "native").glob("base_step*"), root / "native_build.py"]
    if not built.is_file() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        if shutil.which("g++") is None:
            pytest.skip("there is no compiler, and the library is not built")
        spec = importlib.util.spec_from_file_location("native_build", root / "native_build.py")
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        folder = tmp_path_factory.getbasetemp() / "native-base"
        built = folder / "libbase_step.so"
        if not built.is_file():
            folder.mkdir(exist_ok=True)
            build.compile_library(built)
    try:
        made = BaseKernel(open_library("base_step", VERSION, built.parent))
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(base_step, "base_kernel", lambda: made)
    return made


def random(*shape: int, seed: int = 0, coarse: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().float() if coarse else values


@pytest.mark.parametrize("coarse", [True, False], ids=["weights from bfloat16", "weights of full float32"])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 16, 49, 130])
@pytest.mark.parametrize(("width_in", "width_out"), [(64, 96), (37, 1), (576, 50)])
def test_a_linear_layer_equals_the_product(rows: int, width_in: int, width_out: int, coarse: bool) -> None:
    weight, bias = random(width_out, width_in, seed=1, coarse=coarse), random(width_out, seed=2)
    x = random(rows, width_in, seed=3)
    layer = PanelLinear(weight, bias)
    exact = (x.double() @ weight.double().T + bias).float()
    torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=2e-6 * width_in**0.5)


def test_weights_that_come_from_bfloat16_are_kept_at_half_the_bytes() -> None:
    coarse, fine = (PanelLinear(random(64, 32, coarse=coarse), None) for coarse in (True, False))
    assert (coarse.nbytes, fine.nbytes) == (64 * 32 * 2, 64 * 32 * 4)


def test_a_bfloat16_layer_sums_in_float32_and_rounds_once() -> None:
    weight, x = random(96, 64, seed=1).bfloat16(), random(16, 64, seed=2).bfloat16()
    exact = x.double() @ weight.double().T
    y = PanelLinear(weight, None)(x)
    assert y.dtype == torch.bfloat16
    assert float(((y.double() - exact).abs() / exact.abs().clamp_min(1e-3)).max()) <= 2**-8


def test_a_row_is_the_same_bit_for_bit_in_any_batch() -> None:
    layer, x = PanelLinear(random(200, 144, coarse=True), None), random(100, 144, seed=4)
    together = layer(x)
    for row in (0, 47, 48, 99):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_what_is_not_finite_in_one_row_stays_there() -> None:
    layer, x = PanelLinear(random(40, 32), None), random(16, 32, seed=4)
    clean = layer(x)
    x[3, 5] = math.nan
    y = layer(x)
    assert bool(y[3].isnan().all())
    keep = [i for i in range(16) if i != 3]
    assert torch.equal(y[keep], clean[keep])


def test_an_input_of_another_type_or_width_is_refused() -> None:
    layer = PanelLinear(random(40, 32), None)
    for x in (random(4, 31), random(4, 32).double()):
        with pytest.raises(ValueError, match="the layer takes"):
            layer(x)


def expected(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """q: [heads, dim]; k, v: [kv_heads, dim] of the new token; seen: [2, length, kv_heads, dim] before it."""
    keys, values = torch.cat([seen[0], k[None]]), torch.cat([seen[1], v[None]])
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    group = q.shape[0] // k.shape[0]
    keys, values = (t.repeat_interleave(group, 1).double() for t in (keys, values))  # [length, heads, dim]
    scores = torch.einsum("hd,lhd->hl", q.double(), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 3.0), (21, 2.0)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 2, 16), (3, 3, 96)])
def test_decoding_rows_attend_to_their_own_tokens(
    heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    size, lengths, tables = 8, [1, 8, 9, 40], [[7], [3], [1, 5], [2, 9, 4, 8, 6]]
    pool = random(2, 10 * size, kv_heads, dim, seed=1).to(dtype)
    pool[:, :size] = math.nan  # block 0 pads the tables: it must not be read
    q, k, v = (random(n, 6, dim, seed=seed).to(dtype) for seed, n in ((2, heads), (3, kv_heads), (4, kv_heads)))
    padded = torch.tensor([table + [0] * (5 - len(table)) for table in tables], dtype=torch.int32)
    step = PagedDecode(
        padded, torch.tensor(lengths, dtype=torch.int32), kv_heads=kv_heads, head_dim=dim, block_size=size
    )
    before = pool.clone()
    out = step.attend(q, k, v, pool[0], pool[1], scale=0.2, window=window, softcap=softcap)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        at = torch.tensor([table[i // size] * size + i % size for i in range(length)])
        assert torch.equal(pool[0, at[-1]], k[:, row])
        assert torch.equal(pool[1, at[-1]], v[:, row])
        before[:, at[-1]] = pool[:, at[-1]]
        want = expected(q[:, row], k[:, row], v[:, row], before[:, at[:-1]], 0.2, window, softcap)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[row].double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(pool.nan_to_num(5.0), before.nan_to_num(5.0))  # nothing else was written


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("length", "window"), [(7, None), (29, None), (40, 16), (513, None), (1100, None)])
def test_bfloat16_attention_rounds_where_torchs_operators_round(
    length: int, window: int | None, softcap: float | None
) -> None:
    pool = random(2, length, 2, 64, seed=length).bfloat16()
    q = random(6, 1, 64, seed=2).bfloat16() * 2
    step = PagedDecode(
        torch.tensor([[0]], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        kv_heads=2,
        head_dim=64,
        block_size=length,
    )
    k, v = (t[-1].clone()[:, None] for t in pool)
    out = step.attend(q, k, v, pool[0], pool[1], scale=0.125, window=window, softcap=softcap)
    keys, values = (
        t[-(window or length) :].transpose(0, 1).repeat_interleave(3, 0) for t in pool
    )  # [heads, seen, dim]
    if softcap is None:
        want = torch.nn.functional.scaled_dot_product_attention(q[None], keys[None], values[None], scale=0.125)[0]
    else:
        scores = torch.tanh(q @ keys.transpose(1, 2) * 0.125 / softcap) * softcap
        want = torch.softmax(scores, -1, dtype=torch.float32).bfloat16() @ values
    if softcap is None and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # without vector instructions torch's fused attention rounds in other places
        torch.testing.assert_close(out[0], want[:, 0], rtol=2**-7, atol=2**-7)
        return
    same = float((out[0] == want[:, 0]).float().mean())
    assert same > 0.98  # what is left was a tie within float32's own error


def test_a_score_that_is_not_a_number_spoils_its_own_row_alone() -> None:
    pool = random(2, 32, 2, 16, seed=1)
    q, k, v = random(4, 2, 16, seed=2), random(2, 2, 16, seed=3), random(2, 2, 16, seed=4)
    q[:, 0, 3] = math.nan
    lengths = torch.tensor([4, 5], dtype=torch.int32)
    tables = torch.tensor([[1], [2]], dtype=torch.int32)
    step = PagedDecode(tables, lengths, kv_heads=2, head_dim=16, block_size=8)
    out = step.attend(q, k, v, pool[0], pool[1], scale=0.2, window=None, softcap=None)
    assert bool(out[0].isnan().all())
    assert bool(out[1].isfinite().all())


def test_a_library_that_was_not_built_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailableError, match=r"libbase_step\.so was not built"):
        open_library("base_step", VERSION, tmp_path)


def test_no_library_is_opened_where_the_environment_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPOOL_NATIVE", "0")
    with pytest.raises(NativeUnavailableError, match="LORAPOOL_NATIVE=0"):
        open_library("base_step", VERSION)


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPOOL_NATIVE", "sse9")
    with pytest.raises(NativeSettingError, match="'sse9', not one of auto, 0, baseline, avx2, avx512"):
        open_library("base_step", VERSION)


@pytest.mark.parametrize("setting", ["auto", "baseline", "avx2", "avx512"])
def test_the_kernels_keep_to_the_instruction_set_of_the_environment(
    setting: str, tmp_path: Path, kernel: BaseKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(kernel.library._name, tmp_path / "libbase_step.so")  # a copy is loaded once more
    monkeypatch.setenv("LORAPOOL_NATIVE", setting)
    has = torch.cpu.get_capabilities()
    has_avx512 = bool(has.get("avx512_f") and has.get("avx512_bw") and has.get("avx512_vl"))
    if setting == "avx512" and not has_avx512:
        with pytest.raises(NativeSettingError, match="this processor does not have"):
            open_library("base_step", VERSION, tmp_path)
        return
    if setting == "baseline":
        with pytest.raises(NativeUnavailableError, match="LORAPOOL_NATIVE=baseline"):
            BaseKernel(open_library("base_step", VERSION, tmp_path))
        return
    best = "avx512" if has_avx512 else "avx2"
    assert BaseKernel(open_library("base_step", VERSION, tmp_path)).isa == (best if setting == "auto" else setting)


@pytest.mark.parametrize("width", [64, 37, 576])
@pytest.mark.parametrize("plus_one", [False, True])
def test_a_norm_divides_by_the_root_mean_square(width: int, plus_one: bool) -> None:
    x, weight = random(2, 7, width, seed=1), random(width, seed=2)
    want = torch.nn.functional.rms_norm(x, (width,), weight + plus_one, 1e-5)
    torch.testing.assert_close(
        RowNorm(weight, 1e-5, plus_one=plus_one, round_first=True)(x), want, rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("width", [64, 37])
@pytest.mark.parametrize(
    ("activation", "function"),
    [("silu", torch.nn.functional.silu), ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"))],
)
def test_a_gate_is_activated_and_multiplied(
    width: int,
    activation: str,
    function: Callable[[Tensor], Tensor],
) -> None:
    both = random(9, 2 * width, seed=1) * 8
    both[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -30.0])
    want = function(both[:, :width]) * both[:, width:]
    torch.testing.assert_close(RowGate(width, torch.float32, activation)(both), want, rtol=5e-6, atol=1e-5)
    both[2, 3] = math.nan
    y = RowGate(width, torch.float32, activation)(both)
    assert bool(y[2, 3].isnan())
    assert int(y.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("architecture", "fitted"),
    [
        ("Llama", 7),
        ("Qwen2", 7),
        ("Qwen3", 11),
        ("Mistral", 7),
        ("Gemma2", 11),
        ("Olmo2", 11),
        ("Phi3", 5),
        ("Granite", 7),
    ],
)
def test_norms_and_gated_products_are_found_by_what_they_compute(
    architecture: str, fitted: int, tmp_path: Path
) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="float32", device=torch.device("cpu"))
    found = [module for module in base.model.modules() if isinstance(module, NativeNorm | NativeMLP)]
    assert len(found) == fitted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [25.0, 900.0])
def test_modules_that_clamp_large_activations_are_not_replaced(
    dtype: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    norm, mlp = modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward
    tiny_model("Llama").save_pretrained(tmp_path)

    def native() -> list[torch.nn.Module]:
        base = load_base(str(tmp_path), dtype=dtype, device=torch.device("cpu"))
        return [module for module in base.model.modules() if isinstance(module, NativeNorm | NativeMLP)]

    assert len(native()) == 7
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: norm(self, x.clamp(-limit, limit)))
    assert {type(module) for module in native()} == {NativeMLP}
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: mlp(self, x.clamp(max=limit)))
    assert native() == []
