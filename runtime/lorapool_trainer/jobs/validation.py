"""When a job is measured on its validation examples, which result is the best, and when training stops early. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

EVALUATIONS = 10
"""At most so many in a job, between the first step and the last."""
MAX_SANE_LOSS = 100.0
"""Mean loss in nats above which a step counts as broken: guessing costs about 12 with the largest vocabularies."""
BROKEN_STEPS = 3
"""So many broken steps in a row end a job as Diverged."""


def evaluation_interval(total_steps: int, train_tokens_per_step: float, validation_tokens: int) -> int:
    """Steps between two evaluations: a tenth of the job, and no more validation tokens than training tokens."""
    by_cost = math.ceil(validation_tokens / max(1.0, train_tokens_per_step))
    return max(1, math.ceil(total_steps / EVALUATIONS), by_cost)


def is_due(step: int, total_steps: int, interval: int) -> bool:
    """Whether the job is measured after `step` steps. Step 0 is the base's own loss."""
    return step > 0 and (step % interval == 0 or step >= total_steps)


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """Early stopping after `patience` evaluations in which the loss did not fall by more than `min_delta`."""

    patience: int
    min_delta: float


@dataclass(frozen=True, slots=True)
class Best:
    """The lowest validation loss so far, and for how many evaluations it has not fallen noticeably."""

    loss: float | None = None
    step: int | None = None
    accuracy: float | None = None
    reference: float | None = None
    """The loss that the next improvement is measured from."""
    stale: int = 0

    def after(self, loss: float, accuracy: float, step: int, rule: StoppingRule | None) -> Best:
        """A loss that is not finite is no improvement."""
        fell = math.isfinite(loss) and (self.loss is None or loss < self.loss)
        delta = rule.min_delta if rule is not None else 0.0
        improved = math.isfinite(loss) and (self.reference is None or loss < self.reference - delta)
        return Best(
            loss if fell else self.loss,
            step if fell else self.step,
            accuracy if fell else self.accuracy,
            loss if improved else self.reference,
            0 if improved else self.stale + 1,
        )

    def stops(self, rule: StoppingRule | None) -> bool:
        return rule is not None and self.stale >= rule.patience


def broken_after(broken: int, loss: float, skipped: bool) -> int:
    """Steps in a row whose loss or gradient was not finite, or whose loss no model can have by learning."""
    return broken + 1 if skipped or not loss <= MAX_SANE_LOSS else 0
