"""Steps of made-up requests and adapters, by which an engine is checked at start. The pool and the slots are left "
"unused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence as EngineSequence
from lorapool_runtime.weights.layout import Layout, lay_out

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of logits, relative to the largest. Rounding stays far below it; a wrong mask or weight does not."""
_ADAPTER_RANK = 4
_ADAPTER_SCALE = 0.05
"""Of the numbers in a trial adapter: what it adds to a wide layer is a third of what the layer computes."""


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; NaN where either has one. [rows, vocabulary] both."""
    logits, expected = logits.float(), expected.float()
    return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def decode_plan(pool: KVPool, contexts: Sequence[int], vocab_size: int, slots: Sequence[int] | None = None) -> StepPlan:
    """One decoding row for each context length, as many as the pool has blocks.

    Each row has one block, which its table repeats: so a long context touches no more memory than a short one."""
    chunks = []
    for number, context in enumerate(contexts[: pool.data.shape[2] - 1]):
        prompt = tuple((11 + 17 * number + 7 * i) % vocab_size for i in range(context))
        slot = BASE_SLOT if slots is None else slots[number]
        request = GenerationRequest(f"trial-{number}", prompt, slot, "trial", SamplingParams(max_tokens=1))
        sequence = EngineSequence(request, arrival=number, seed=0)
        sequence.admit([1 + number] * -(-context // pool.block_size))
        chunks.append(Chunk(sequence, context - 1, 1))
    return StepPlan(tuple(chunks), (), (), ())


def blocks_of(plan: StepPlan) -> tuple[int, ...]:
    return tuple(sorted({block for chunk in plan.chunks for block in chunk.sequence.block_table}))


@dataclass(frozen=True)
class _RandomAdapter:
    """`slot_memory.PackedWeights` of random numbers."""

    layout: Layout
    buffer: np.ndarray


@contextmanager
def random_adapters(base: Base, adapters: AdapterSlots) -> Iterator[tuple[int, ...]]:
    """The slots of adapters that exist meanwhile: one on every linear, one on two thirds of them with mixed ranks."""
    by_kernel = [group.by_kernel for group in base.groups for _ in group.modules]  # others are computed by torch
    rank = min(_ADAPTER_RANK, adapters.max_rank)
    ranks = ([rank * adapts for adapts in by_kernel], [min(rank, n % 3) * adapts for n, adapts in enumerate(by_kernel)])
    slots = tuple(range(min(len(ranks), adapters.count)))
    for slot in slots:
        layout = lay_out(base.groups, tuple(ranks[slot]), base.dtype.itemsize)
        adapters.fill(slot, _RandomAdapter(layout, _random_numbers(layout.elements, base.dtype, seed=slot)))
        adapters.publish(slot)
    try:
        yield slots
    finally:
        for slot in slots:
            adapters.withdraw(slot)
            adapters.release(slot)


def _random_numbers(elements: int, dtype: torch.dtype, *, seed: int) -> np.ndarray:
    """[elements], bfloat16 as its 16-bit patterns."""
    values = torch.randn(elements, generator=torch.Generator().manual_seed(seed)).mul_(_ADAPTER_SCALE).to(dtype)
    return values.numpy() if dtype == torch.float32 else values.view(torch.int16).numpy().view(np.uint16)
