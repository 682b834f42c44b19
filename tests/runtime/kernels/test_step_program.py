"""The decode step as one native call: learned from the model, equal to it bit for bit, or left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import save_adapter, tiny_model

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.engines.torch.decode_program.step_program import KINDS, StepProgram
from lorapool_runtime.engines.torch.kernels.base_step import base_kernel
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence

FOLLOWED = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3", "Olmo2", "Granite"]
LEFT_ALONE = [("Phi3", "float32"), ("Qwen3Moe", "float32"), ("Mixtral", "float32"), ("Olmo2", "bfloat16")]
"""What they compute between their layers is no list of the native kernels (OLMo 2 turns bfloat16 heads in float32)."""
RANKS = (4, 16, 3)

pytestmark = pytest.mark.skipif(base_kernel() is None, reason="the native kernels are not built, or not for this CPU")


def core_of(folder: Path, architecture: str, **changes: Any) -> Core:
    model = tiny_model(architecture)
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


def logits_of_decodes(core: Core, program: StepProgram | None) -> list[torch.Tensor]:
    """Eight rows on all slots and the base join and leave; the logits of every step that only decodes."""
    core.runner.decode_path = program
    seen: list[torch.Tensor] = []
    run = core.runner.run

    def noted(plan: Any) -> torch.Tensor:
        logits = run(plan)
        if not plan.prefills:
            seen.append(logits.clone())
        return logits

    core.runner.run = noted  # type: ignore[method-assign]  # for this one run
    for number in range(8):
        prompt = tuple(5 + (number * 31 + i * 7) % 300 for i in range(1 + 3 * number))
        slot = (BASE_SLOT, 2, 0, 1, 1, BASE_SLOT, 0, 2)[number]
        sampling = SamplingParams(max_tokens=3 + 2 * number, temperature=0.0, ignore_eos=True)
        core.add(GenerationRequest(f"r{number}", prompt, slot, f"salt-{slot}", sampling))
    while core.scheduler.has_work:
        core.step()
    core.runner.run = run  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(a, t) for a in FOLLOWED for t in ("float32", "bfloat16") if (a, t) not in LEFT_ALONE],
)
def test_the_program_gives_the_models_logits_bit_for_bit(tmp_path: Path, architecture: str, dtype: str) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, architecture, dtype=dtype, prefix_cache=False)
        program = core.runner.decode_path
        assert isinstance(program, StepProgram)
        want, got = logits_of_decodes(core, None), logits_of_decodes(core, program)
    assert len(want) == len(got) > 10
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(("architecture", "dtype"), LEFT_ALONE)
def test_a_model_that_cannot_be_followed_goes_on_as_it_is(
    tmp_path: Path, architecture: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode(), caplog.at_level("INFO"):
        core = core_of(tmp_path, architecture, dtype=dtype)
        assert core.runner.decode_path is None
        assert "no decode program" in caplog.text
        assert logits_of_decodes(core, None)


def test_an_operator_between_the_kernels_that_depends_on_the_rows_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned from one run is proved on another: here a norm that answers otherwise from the next call on."""
    from lorapool_runtime.engines.torch.decode_program import step_program

    learned = step_program._learned

    def and_then_changed(base: Any, pool: Any) -> Any:
        recipe = learned(base, pool)
        base.model.get_submodule("model.norm")._norm._weight.mul_(2)
        base.model.get_submodule("model.norm").register_forward_hook(lambda module, args, y: y * 2)
        return recipe

    monkeypatch.setattr(step_program, "_learned", and_then_changed)
    with torch.inference_mode():
        assert core_of(tmp_path, "Llama").runner.decode_path is None


def test_a_batch_of_one_and_a_pool_of_one_block_have_their_program_too(tmp_path: Path) -> None:
    with torch.inference_mode():
        core = core_of(tmp_path, "Llama", max_batch=1, kv_bytes=2 * 2 * 2 * 2 * 16 * 16 * 4, kv_block_tokens=16)
        assert isinstance(core.runner.decode_path, StepProgram)
        assert core.scheduler.allocator.total == 1


def test_a_crowd_on_one_adapter_is_left_to_plain_products(tmp_path: Path) -> None:
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
    monkeypatch.setattr("lorapool_runtime.engines.torch.decode_program.step_program.base_kernel", lambda: None)
    with torch.inference_mode():
        assert core_of(tmp_path, "Llama").runner.decode_path is None


def test_the_clock_tells_the_kinds_of_operators_apart(tmp_path: Path) -> None:
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
