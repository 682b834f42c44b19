"""What the engine reports of cycles, steps and evaluations, and the state of a job that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished optimiser step of one job."""

    uid: str
    step: int
    """Counted from 1."""
    loss: float
    """Mean over the counted tokens of the whole batch, in nats; not finite for a step that was skipped for its loss."""
    counted: int
    correct: int
    """Counted tokens that have the highest logit."""
    tokens: int
    """All tokens of the batch, prompts included."""
    learning_rate: float
    grad_norm: float
    """Before the clip; NaN when the loss was not finite."""
    skipped: bool
    """The loss or a gradient was not finite, so no update was made."""
    consecutive_skips: int


@dataclass(frozen=True, slots=True)
class CycleReport:
    tokens: Mapping[str, int]
    """Computed tokens by job."""
    rows: int
    """Rows that the base computed, padding included."""
    steps: tuple[StepReport, ...]
    out_of_memory: bool = False
    """The accelerator's memory did not suffice: the token budget was halved, and the jobs of the cycle compute their
    current step again from its first micro-batch."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    loss_sum: float
    """In nats, over the counted tokens."""
    counted: int
    correct: int
    tokens: int


@dataclass(frozen=True, slots=True)
class JobState:
    """All that a job needs to continue, with its settings and examples, as if it had not been interrupted.

    Micro-batches of an unfinished step are not part of it: that step is computed again.
    """

    tensors: Mapping[str, Tensor]
    """float32 on the CPU: `<module>.lora_A` [rank, in], `<module>.lora_B` [out, rank], and the two moments of AdamW of
    each, `<...>.exp_avg` and `<...>.exp_avg_sq`."""
    step: int
    """Finished optimiser steps, skipped ones included."""
    updates: int
    """Steps that changed the weights."""
    skipped_steps: int
    consecutive_skips: int
    trained_tokens: int
