"""A step of the GPU waits for the device once: shown on tensors without values, where anything else raises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import VOCAB, greedy, peft_world, request, tiny_model
from gpu_kit import ADAPTERS, META, core_of, meta_graphs, read
from torch import Tensor
from triton_kit import CaptureGuard, NotCapturableError

from lorapool_runtime.engines.interface import BASE_SLOT, SamplingParams
from lorapool_runtime.engines.torch import core, runner, sampling, transfers
from lorapool_runtime.engines.torch.lora import kernel_gpu
from lorapool_runtime.engines.torch.model import attention, kv_pool
from lorapool_runtime.engines.torch.model.attention import PagedAttention, TritonRows
from lorapool_runtime.engines.torch.runner import Runner
from lorapool_runtime.engines.torch.sampling import LogitShaper, SampleRow, launch
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence as EngineSequence
from lorapool_runtime.engines.torch.transfers import StagedCopier


class EveryOther:
    """A constraint on every other token."""

    complete = False

    def mask(self) -> bytes:
        return b"\x55" * (VOCAB // 8)

    def accept(self, token_id: int) -> None:
        pass


KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.7},
    {"top_k": 5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_p": 0.5, "top_logprobs": 3},
    {"temperature": 0.0, "logit_bias": {3: 1.0, 5: -1.0}, "top_logprobs": 0},
)


@pytest.fixture
def queued_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `to_device` copies arrives without values."""

    def to_device(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(np.shape(values), dtype=dtype, device=device)

    for module in (sampling, runner, attention, kv_pool, kernel_gpu):
        monkeypatch.setattr(module, "to_device", to_device)


def rows_of_every_kind(tokens: list[int]) -> list[SampleRow]:
    rows = []
    for number, kind in enumerate(KINDS):
        params = SamplingParams(max_tokens=9, **kind)
        shaper = LogitShaper(params) if LogitShaper.needed(params) else None
        for constraint in (None, EveryOther()):
            rows.append(SampleRow(params, number, len(tokens) - 2, tokens, 2, shaper, constraint))
            shaper = None
    return rows


@pytest.mark.usefixtures("queued_copies")
@pytest.mark.parametrize("kinds", [slice(None), slice(0, 1), slice(2, 3), slice(4, 5), slice(8, 9), slice(12, 13)])
def test_sampling_is_queued_without_a_value_from_the_device(kinds: slice) -> None:
    tokens = [5, 6, 7]
    rows = rows_of_every_kind(tokens)[kinds]
    for token in (7, 8):  # the second step adds one token to what the device has
        with torch.inference_mode(), CaptureGuard(META):
            launched = launch(torch.empty(len(rows), VOCAB, device=META), rows)
        assert {tensor.device for tensor in launched.tensors} == {META}
        tokens.append(token)


@pytest.mark.usefixtures("queued_copies")
def test_a_step_with_prompts_and_decoding_rows_is_queued_without_a_value_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = meta_graphs(tmp_path, "Llama", monkeypatch)
    use_triton(monkeypatch)
    chunks = []
    rows = ((9, 8, BASE_SLOT), (6, 5, 1), (20, 0, 1), (11, 4, 2), (3, 0, BASE_SLOT))
    for number, (tokens, start, slot) in enumerate(rows):
        sequence = EngineSequence(request(str(number), [1] * tokens, greedy(1), slot=slot), arrival=number, seed=0)
        sequence.admit([1 + 5 * (number % 3) + i for i in range(-(-tokens // 4))])
        chunks.append(Chunk(sequence, start, tokens - start))
    plan = StepPlan(tuple(chunks[:2]), tuple(chunks[2:]), (3, 4), ())
    run = Runner(graphs._base, graphs._pool)
    with torch.inference_mode(), CaptureGuard(META) as guard:
        logits = run.run(plan)
        finite = graphs._pool.are_finite([1, 2, 3])
    assert logits.shape == (5, VOCAB)
    assert finite.shape == (3,)
    assert "lorapool::paged_attend" in guard.ran
    assert "lorapool::lora_segments" in guard.ran


def test_the_guard_refuses_a_copy_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two tests above would show if a step copied as torch does by default."""
    row = SampleRow(SamplingParams(max_tokens=1), 0, 0, [1], 1)
    with pytest.raises(NotCapturableError), torch.inference_mode(), CaptureGuard(META):
        launch(torch.empty(1, VOCAB, device=META), [row])


def test_a_step_fetches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("Llama", num_hidden_layers=1).save_pretrained(tmp_path)
    engine = core_of(tmp_path, max_batch=8, max_batch_tokens=64)
    fetched: list[int] = []

    def fetch(tensors: Sequence[Tensor]) -> list[Any]:
        fetched.append(len(tensors))
        return transfers.fetch(tensors)

    for module in (core, sampling):
        monkeypatch.setattr(module, "fetch", fetch)
    with torch.inference_mode():
        for number, kind in enumerate(KINDS):
            params = SamplingParams(max_tokens=4, ignore_eos=True, **kind)
            engine.add(request(str(number), [5, 6, 7 + number, 8, 9], params))
        steps = 0
        while engine.scheduler.has_work:
            engine.step()
            steps += 1
            assert len(fetched) == steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: torch reports each wait for it")
def test_a_step_on_a_gpu_waits_for_nothing_but_its_fetch(tmp_path: Path) -> None:
    tiny_model("Llama").save_pretrained(tmp_path)
    engine = core_of(tmp_path, device="cuda", max_batch=8, max_batch_tokens=64)
    with torch.inference_mode():
        for number, kind in enumerate(KINDS):
            params = SamplingParams(max_tokens=4, ignore_eos=True, **kind)
            engine.add(request(str(number), [5, 6, 7 + number, 8, 9], params))
        torch.cuda.set_sync_debug_mode("error")
        try:
            while engine.scheduler.has_work:
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding rows are computed as on a GPU."""

    def decoder_of(self: PagedAttention, plan: StepPlan) -> TritonRows:
        size = self.pool.block_size
        width = max(-(-(chunk.start + 1) // size) for chunk in plan.decodes)
        tables = [attention._padded(chunk.sequence.block_table, width) for chunk in plan.decodes]
        return TritonRows(self.pool, self.positions[: self.decoding], tables, [c.start for c in plan.decodes])

    monkeypatch.setattr(PagedAttention, "_decoder_of", decoder_of)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where NaN is multiplied on purpose
def test_on_a_gpu_blocks_need_no_wiping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks hold NaN when they are allocated; a prompt in chunks, a shared prefix and decoding rows read none "
    "of it."""
    world = peft_world(tmp_path, tiny_model("Llama", num_hidden_layers=1), {"qv": ADAPTERS["qv"]})
    engine = core_of(world.base, max_batch_tokens=8)
    engine.load(0, read(engine, world.adapters["qv"]))
    use_triton(monkeypatch)
    monkeypatch.setattr("lorapool_runtime.engines.torch.kernels.triton_attention._PARTS", 1)
    engine.runner.decode_path, engine.runner._wipes = None, False
    engine.pool.data[:, :, 1:] = float("nan")
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 6, 7, 8, 9, 10, 11, 12, 20]]
    tokens: dict[str, list[int]] = {}
    with torch.inference_mode():
        for slot, adapter in ((BASE_SLOT, None), (0, "qv")):
            for number, prompt in enumerate(prompts):
                name = f"{adapter}-{number}"
                engine.add(request(name, prompt, greedy(3), slot=slot))
                while engine.scheduler.has_work:
                    for output in engine.step():
                        assert output.token_id is not None, output.error
                        tokens.setdefault(name, []).append(output.token_id)
                assert tokens[name] == world.answer(adapter, prompt, 3), name
    assert engine.scheduler.hit_tokens == 2 * 8


# --- copies next to the computation ---


class LateQueue:
    """A queue that copies as late as it may: when a copy is waited for, and with it those before."""

    def __init__(self) -> None:
        self.queued: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.events: list[str] = []

    def begin(self) -> None:
        self.events.append("begin")

    def copy(self, target: Tensor, source: Tensor) -> int:
        self.queued.append((target, source))
        self.events.append("copy")
        return len(self.queued)

    def wait(self, copied: int) -> None:
        for target, source in self.queued[self.done : copied]:
            target.copy_(source)
        self.done = max(self.done, copied)


@pytest.mark.parametrize("elements", [1, 15, 16, 17, 32, 100])
def test_weights_arrive_whole_however_late_the_device_copies(elements: int) -> None:
    queue = LateQueue()
    first, second = (torch.zeros(64, dtype=torch.uint8) for _ in range(2))  # 16 float32 each
    copier = StagedCopier(queue, (first, second))
    for seed in range(2):
        source = torch.randn(elements, generator=torch.Generator().manual_seed(seed))
        target = torch.zeros(elements)
        copier.copy(target, source)
        assert torch.equal(target, source)
    assert queue.events[0] == "begin"
    assert queue.events.count("begin") == 2


def test_a_buffer_is_filled_again_only_after_its_copy() -> None:
    """The same without waiting: the late queue then copies what has been overwritten."""

    class NeverWaits(LateQueue):
        def wait(self, copied: int) -> None:
            if copied == 7:  # the last one
                super().wait(copied)

    first, second = (torch.zeros(64, dtype=torch.uint8) for _ in range(2))
    source, target = torch.randn(100), torch.zeros(100)
    StagedCopier(NeverWaits(), (first, second)).copy(target, source)
    assert not torch.equal(target, source)
