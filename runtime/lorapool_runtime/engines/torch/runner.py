"""Runs the model for one step: from the scheduler's plan to the logits of the requested rows.

The runner keeps no state of requests. `self_check` verifies at start that the modified model (packed layers, paged
attention, chunks, decoding) computes what the stock model does.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorapool_runtime.engines.errors import UnsupportedBaseError
from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.lora.dispatch import SlotRows
from lorapool_runtime.engines.torch.model.attention import PagedAttention
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence
from lorapool_runtime.engines.torch.transfers import to_device
from lorapool_runtime.engines.torch.trial_steps import TOLERANCE, relative_error


class DecodePath(Protocol):
    """A faster implementation of steps that only decode: CUDA graphs on a GPU, the decode program on a CPU."""

    def can_run(self, plan: StepPlan) -> bool: ...

    def run(self, plan: StepPlan) -> Tensor: ...


class Runner:
    def __init__(self, base: Base, pool: KVPool) -> None:
        self.base, self.pool = base, pool
        self.decode_path: DecodePath | None = None
        self._wipes = PagedAttention.reads_whole_blocks(pool)

    def run(self, plan: StepPlan) -> Tensor:
        """Computes a step. Returns [rows, vocabulary] for each chunk's `logit_rows`, in the order of the plan."""
        if self._wipes:
            self.pool.wipe(plan.fresh_blocks)
        if self.decode_path is not None and self.decode_path.can_run(plan):
            return self.decode_path.run(plan)
        token_ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        rows: list[SlotRows] = []
        kept: list[SlotRows] = []
        for chunk in plan.chunks:
            begin, end = len(token_ids), len(token_ids) + chunk.num_tokens
            token_ids += chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
            positions += range(chunk.start, chunk.start + chunk.num_tokens)
            rows.append(SlotRows(chunk.sequence.slot, begin, end))
            kept.append(SlotRows(chunk.sequence.slot, len(keep), len(keep) + len(chunk.logit_rows)))
            keep += [begin + row for row in chunk.logit_rows]
        device = self.base.device
        self.base.lora.set(rows, kept if keep else (SlotRows(BASE_SLOT, 0, 1),))
        logits = self.base.logits(
            to_device(token_ids, torch.int64, device),
            to_device(positions, torch.int64, device),
            to_device(keep or [0], torch.int64, device),
            PagedAttention(self.pool, plan),
        )
        return logits[: len(keep)]

    def self_check(self) -> None:
        """Raises UnsupportedBaseError unless a prompt in two chunks and a decode give the stock model's logits."""
        probe = self.base.probe
        sequence = Sequence(
            GenerationRequest("self-check", probe.token_ids, BASE_SLOT, "base", SamplingParams(max_tokens=1)),
            arrival=0,
            seed=0,
        )
        total = len(probe.token_ids)
        sequence.admit(list(range(1, 1 + -(-total // self.pool.block_size))))
        for size in (total - 5, 4, 1):
            whole, sequence.tokens = sequence.tokens, list(probe.token_ids[: sequence.computed + size])
            chunk = Chunk(sequence, sequence.computed, size)
            plan = StepPlan((chunk,), (), (), ()) if size == 1 else StepPlan((), (chunk,), (), ())
            logits = self.run(plan)[0]
            sequence.advance(size)
            sequence.tokens = whole
            error = relative_error(logits, probe.logits[sequence.computed - 1])
            if not error <= TOLERANCE[self.base.dtype]:
                raise UnsupportedBaseError(
                    f"the modified model differs from the stock one (relative error {error:.2g})"
                )
        self.pool.wipe(tuple(sequence.block_table))
