"""What a job is: its resolved settings and its examples. Everything here is immutable and needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

ALL_LINEAR = "all-linear"


class Numerics(StrEnum):
    EXACT = "Exact"
    """A job ends with the same bits as if it had been trained alone."""
    FAST = "Fast"
    """Rows are not padded: results may differ in the last bits with the neighbours of a cycle."""


class Schedule(StrEnum):
    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


@dataclass(frozen=True, slots=True)
class JobSettings:
    """Resolved hyper-parameters. A job's result is a function of these, its examples and the base."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    """As in peft: names or endings of names; a string is `all-linear` or an expression that matches whole names."""
    epochs: int = 3
    max_steps: int | None = None
    """Optimiser steps after which training ends, if the epochs have more."""
    batch_size: int = 8
    """Examples of one optimiser step."""
    learning_rate: float = 1e-3
    """The highest of the schedule."""
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.06
    """The share of all steps during which the learning rate rises."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; 0 leaves all as they are."""
    seed: int = 0
    micro_batch_tokens: int = 512
    """A batch is computed in micro-batches of consecutive examples with at most so many tokens."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        positive = ("rank", "alpha", "epochs", "batch_size", "learning_rate", "micro_batch_tokens")
        _require(all(_finite(getattr(self, name)) and getattr(self, name) > 0 for name in positive), positive, "> 0")
        _require(self.max_steps is None or self.max_steps > 0, ("max_steps",), "> 0")
        _require(0 <= self.dropout < 1, ("dropout",), ">= 0 and < 1")
        _require(0 <= self.warmup <= 1, ("warmup",), ">= 0 and <= 1")
        decay = ("weight_decay", "max_grad_norm")
        _require(all(_finite(getattr(self, name)) and getattr(self, name) >= 0 for name in decay), decay, ">= 0")


@dataclass(frozen=True, slots=True)
class Example:
    ids: tuple[int, ...]
    """Tokens of prompt and answer, at least two."""
    counted: tuple[bool, ...]
    """Of the same length: whether the loss of predicting this token counts. That of the first never does."""

    @property
    def counted_tokens(self) -> int:
        return sum(self.counted[1:])


def steps_per_epoch(settings: JobSettings, examples: int) -> int:
    return -(-examples // settings.batch_size)


def total_steps(settings: JobSettings, examples: int) -> int:
    """Optimiser steps of the whole job. The last batch of an epoch may be smaller."""
    steps = settings.epochs * steps_per_epoch(settings, examples)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate(settings: JobSettings, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, of `steps`: a linear rise, then the schedule, which ends at 0."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    factors = {
        Schedule.COSINE: 0.5 * (1 + math.cos(math.pi * done)),
        Schedule.LINEAR: 1 - done,
        Schedule.CONSTANT: 1.0,
    }
    return settings.learning_rate * factors[settings.schedule]


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _require(holds: bool, names: tuple[str, ...], bound: str) -> None:
    if not holds:
        raise ValueError(f"{', '.join(names)} must be {bound}")
