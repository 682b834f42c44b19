"""The decode program: traced from the model, equal to it bit for bit under every condition, or refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import COMMON, save_adapter, tiny_model
from torch import Tensor

from lorapool_runtime.accounts.usage import UsageTracker
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import BASE_SLOT, DecodeProgramState, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.engines.torch.decode_program.step_program import KINDS, StepProgram, _Program
from lorapool_runtime.engines.torch.decode_program.verify import bound_positions, conditions
from lorapool_runtime.engines.torch.kernels.base_step import base_kernel
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence
from lorapool_runtime.metrics import Gauges, Metrics

TRACED = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3", "Olmo2", "Granite"]
UNTRACEABLE = [("Phi3", "float32"), ("Qwen3Moe", "float32"), ("Mixtral", "float32"), ("Olmo2", "bfloat16")]
"""What they compute between their layers is not a list of native kernels (OLMo 2 rotates bfloat16 heads in float32)."""
RANKS = (4, 16, 3)
UNVERIFIED, ACTIVE = DecodeProgramState(active=False, reason="unverified"), DecodeProgramState(active=True)

pytestmark = pytest.mark.skipif(base_kernel() is None, reason="the native kernels are not built, or not for this CPU")


def core_of(folder: Path, architecture: str, model: Any = None, **changes: Any) -> Core:
    model = tiny_model(architecture) if model is None else model
    model.save_pretrained(folder / "base")
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "slots": 4, "max_batch": 8, "kv_block_tokens": 4}
    core = Core(EngineConfig(str(folder / "base"), **settings | changes))
    for slot, rank in enumerate(RANKS):
        projections = ["q_proj", "o_proj"] if slot else ["v_proj", "down_proj", "gate_proj"]
        if architecture in ("Phi3", "Qwen3Moe", "Mixtral"):
            projections = ["o_proj"]
        saved = save_adapter(folder / str(slot), model, r=rank, target_modules=projections)
        core.load(slot, core.reader.read(saved, max_rank=64))
    return core


def logits_of_decodes(core: Core, program: StepProgram | None) -> list[Tensor]:
    """Eight rows on all slots and the base join and leave, up to the last position; the logits of every step that only
    decodes."""
    core.runner.decode_path = program
    found: list[Tensor] = []
    run = core.runner.run

    def noted(plan: Any) -> Tensor:
        logits = run(plan)
        if not plan.prefills:
            found.append(logits.clone())
        return logits

    core.runner.run = noted  # type: ignore[method-assign]  # for this one run
    for number, length in enumerate((1, 4, 7, 10, 45, 70, 110, 142)):
        prompt = tuple(5 + (number * 31 + i * 7) % 300 for i in range(length))
        slot = (BASE_SLOT, 2, 0, 1, 1, BASE_SLOT, 0, 2)[number]
        sampling = SamplingParams(max_tokens=4 + 2 * number, temperature=0.0, ignore_eos=True)
        core.add(GenerationRequest(f"r{number}", prompt, slot, f"salt-{slot}", sampling))
    while core.scheduler.has_work:
        core.step()
    core.runner.run = run  # type: ignore[method-assign]
    return found


BFLOAT16 = ("Llama", "Gemma3", "Granite")
"""Rotary embeddings alone, two kinds of layers, scaled residuals; the others run with `make test-deep`."""


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((a, "float32") for a in TRACED),
        *(
            pytest.param(a, "bfloat16", marks=[pytest.mark.deep] * (a not in BFLOAT16))
            for a in TRACED
            if (a, "bfloat16") not in UNTRACEABLE
        ),
    ],
)
def test_the_program_gives_the_models_logits_bit_for_bit(tmp_path: Path, architecture: str, dtype: str) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, architecture, dtype=dtype, prefix_cache=False)
        program = core.runner.decode_path
        assert isinstance(program, StepProgram)
        want, got = logits_of_decodes(core, None), logits_of_decodes(core, program)
    assert len(want) == len(got) > 10
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(("architecture", "dtype"), UNTRACEABLE)
def test_an_untraceable_model_is_served_by_its_own_code(
    tmp_path: Path, architecture: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, architecture, dtype=dtype)
        assert core.runner.decode_path is None
        assert core.facts.decode_program == DecodeProgramState(active=False, reason="untraceable")
        assert [r.levelname for r in caplog.records if "no decode program" in r.getMessage()] == ["WARNING"]
        assert logits_of_decodes(core, None)


def ministral() -> Any:
    """Its queries grow with the position from the 32nd on, and are left as they are before."""
    import transformers

    config = transformers.Ministral3Config(
        **COMMON | {"head_dim": 16},
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 3.0,
            "original_max_position_embeddings": 32,
        },
    )
    torch.manual_seed(11)
    return transformers.Ministral3ForCausalLM(config).eval()


def test_what_begins_behind_a_bound_of_the_config_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ministral()
    prompt = torch.tensor([[7 * i % 300 + 3 for i in range(20)]])
    with torch.inference_mode():
        core = core_of(tmp_path, "Mistral", model)
        assert core.facts.decode_program == UNVERIFIED
        assert "layer 0's queries are computed otherwise" in caplog.text
        sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        core.add(GenerationRequest("r", tuple(prompt[0].tolist()), BASE_SLOT, "salt", sampling))
        tokens = [out.token_id for _ in range(60) for out in core.step()]
        want = model.generate(prompt, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == want[0, 20:].tolist()


def test_a_program_that_fails_under_verification_does_not_fail_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Tensor:
        raise RuntimeError("a rotary module takes three rows only")

    monkeypatch.setattr(StepProgram, "replay", failing)
    with torch.inference_mode():
        assert core_of(tmp_path, "Llama").facts.decode_program == UNVERIFIED
    assert "three rows only" in caplog.text


def test_the_metric_reports_a_fallback_and_its_reason() -> None:
    metrics = Metrics("ns/base", UsageTracker(tracked=1), Clock())
    metrics.gauges = lambda: Gauges(decode_program=UNVERIFIED)
    assert (
        b'lorapool_runtime_decode_program{base="ns/base",reason="unverified",state="fallback"} 1.0' in metrics.render()
    )


def test_a_bound_that_no_request_can_reach_costs_no_program(tmp_path: Path) -> None:
    with torch.inference_mode():
        assert core_of(tmp_path, "Mistral", ministral(), max_model_len=32).facts.decode_program == ACTIVE


def clamped(q: Tensor) -> Tensor:
    """As OLMo's `clip_qkv`: nothing that the random weights give reaches it."""
    return q.clamp(-60, 60)


def doubled_in_large_batches(q: Tensor) -> Tensor:
    return q * 2 if q.shape[2] == 8 else q


@pytest.mark.parametrize("change", [clamped, doubled_in_large_batches])
def test_what_is_the_identity_while_tracing_is_noticed(
    change: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    apply = modeling_llama.apply_rotary_pos_emb

    def changed(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = apply(*args, **kwargs)
        return change(q), k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", changed)
    with torch.inference_mode():
        assert core_of(tmp_path, "Llama").facts.decode_program == UNVERIFIED


def test_a_soft_cap_far_above_the_usual_logits_is_noticed(tmp_path: Path) -> None:
    """In bfloat16 it changes no bit of small logits."""
    model = tiny_model("Gemma2", final_logit_softcapping=4096.0)
    with torch.inference_mode():
        assert core_of(tmp_path, "Gemma2", model, dtype="bfloat16").facts.decode_program == UNVERIFIED


def test_a_layer_of_zeros_does_not_lose_its_adapter(tmp_path: Path) -> None:
    """Its residual sum changes nothing, until an adapter of that layer adds to it."""
    model = tiny_model("Llama")
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    with torch.inference_mode():
        assert core_of(tmp_path, "Llama", model).facts.decode_program == UNVERIFIED


def test_values_that_equal_the_keys_are_not_confused_with_them(tmp_path: Path) -> None:
    """The trace finds values by their numbers: where two are equal, it may take the wrong one."""
    model = tiny_model("Llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data.copy_(layer.self_attn.k_proj.weight.data)
    with torch.inference_mode():
        assert core_of(tmp_path, "Llama", model).facts.decode_program == UNVERIFIED


def test_verification_leaves_pool_slots_and_weights_as_they_were(tmp_path: Path) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, "Llama")
        assert core.facts.decode_program == ACTIVE
        assert not core.pool.data.any()
        assert [slot for slot in range(4) if core.slots.is_published(slot)] == [0, 1, 2]  # the test's own adapters
        stock = torch.ones_like(core.base.model.get_submodule("model.norm")._norm._weight)
        assert torch.equal(core.base.model.get_submodule("model.norm")._norm._weight, stock)


def test_one_position_lies_beyond_each_number_of_a_nested_config() -> None:
    config = {
        "rope": {"original": 32.0, "factor": 2.5},
        "window": [8, None],
        "tied": True,
        "vocab": 128256,
        "kind": "x",
    }
    assert bound_positions(config, 159) == (0, 9, 33, 159)
    assert bound_positions({"many": list(range(1000))}, 2000)[-1] == 2000
    assert len(bound_positions({"many": list(range(1000))}, 2000)) == 32


def test_the_last_row_attends_beyond_the_longest_window() -> None:
    steps = list(conditions((0, 9, 5000), rows=2, slots=(0, 1), longest_window=4096, last=5000))
    assert [step.positions for step in steps[:3]] == [(0, 9), (5000,), (5000,)]
    assert [step.slots for step in steps[:3]] == [(BASE_SLOT, 0), (1,), (BASE_SLOT,)]
    assert steps[1].contexts == (4097,)
    assert steps[0].contexts == (1, 10)


def test_a_batch_of_one_and_a_pool_of_one_block_have_their_program_too(tmp_path: Path) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, "Llama", max_batch=1, kv_bytes=2 * 2 * 2 * 2 * 16 * 16 * 4, kv_block_tokens=16)
        assert isinstance(core.runner.decode_path, StepProgram)
        assert core.scheduler.allocator.total == 1


def test_many_rows_of_one_adapter_are_left_to_plain_products(tmp_path: Path) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, "Llama", max_batch=80)
    program = core.runner.decode_path
    assert isinstance(program, StepProgram)

    def plan(*slots: int) -> StepPlan:
        sampling = SamplingParams(max_tokens=1)
        rows = [Sequence(GenerationRequest("r", (1,), slot, "salt", sampling), arrival=0, seed=0) for slot in slots]
        return StepPlan(tuple(Chunk(row, 0, 1) for row in rows), (), (), ())

    assert program.can_run(plan(*[1] * 64, *[BASE_SLOT] * 16))
    assert not program.can_run(plan(*[1] * 65))
    assert not program.can_run(plan(*[BASE_SLOT] * 81))


def test_without_the_kernels_there_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapool_runtime.engines.torch.decode_program.load.base_kernel", lambda: None)
    with torch.inference_mode():
        core = core_of(tmp_path, "Llama")
    assert core.runner.decode_path is None
    assert core.facts.decode_program == DecodeProgramState(active=False, reason="no_kernels")


class LoraRows(ctypes.Structure):
    """`LoraRows` of lora_rows.h."""

    _fields_ = (("order", ctypes.c_void_p), ("runs", ctypes.c_void_p), ("num_runs", ctypes.c_int64))


def bytes_for_the_order_of_rows(threads: int, rows: int) -> int:
    """What the native step allocated for it in this thread; it computes nothing, as the step has no operator."""
    kernel, libc, found = base_kernel(), ctypes.CDLL(None), []
    assert kernel is not None
    libc.malloc_usable_size.argtypes, libc.malloc_usable_size.restype = [ctypes.c_void_p], ctypes.c_size_t
    kernel.library.omp_set_num_threads(threads)

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(LoraRows))
    def sort(row_slots: int, count: int, slots: int, to: Any) -> int:
        found.append(int(libc.malloc_usable_size(to.contents.order)))
        return 0

    calls, row_slots = (ctypes.c_void_p * 6)(ctypes.cast(sort, ctypes.c_void_p)), (ctypes.c_int32 * rows)()
    job = _Program(rows=rows, slots=1, row_slots=ctypes.addressof(row_slots), lora=ctypes.addressof(calls))
    kernel.library.base_step_run.argtypes = [ctypes.c_void_p]
    assert kernel.library.base_step_run(ctypes.addressof(job)) == 0
    return found[0]


def test_more_rows_on_fewer_threads_get_the_memory_they_need() -> None:
    """The second step needs no more memory for the runs of its threads, but more for the order of its rows."""
    with ThreadPoolExecutor(max_workers=1) as fresh_thread:
        fresh_thread.submit(bytes_for_the_order_of_rows, threads=16, rows=4).result()
        assert fresh_thread.submit(bytes_for_the_order_of_rows, threads=1, rows=64).result() >= 64 * 8


def test_time_is_measured_by_kind_of_operator(tmp_path: Path) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, "Llama")
        program = core.runner.decode_path
        assert isinstance(program, StepProgram)
        program.spent_ms()
        logits_of_decodes(core, program)
        spent = program.spent_ms()
    assert spent.keys() == set(KINDS)
    assert all(spent.values())
    program.stop_clock()
