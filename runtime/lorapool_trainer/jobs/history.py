"""What was measured step by step: kept in checkpoints, written as CSV with the columns of OpenAI's result files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
RECENT_STEPS = 10
"""The reported training loss is the mean of so many steps."""


class Row(BaseModel):
    """One optimiser step, or step 0. Losses are means over counted tokens, in nats; None: not measured."""

    model_config = ConfigDict(frozen=True)

    step: int
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None


def finite(value: float) -> float | None:
    """The value for a row: None where it is no number."""
    return value if math.isfinite(value) else None


def with_validation(rows: list[Row], step: int, loss: float, accuracy: float) -> list[Row]:
    """The rows with a measurement after `step`, which is the last one or has no row yet."""
    last = rows[-1] if rows and rows[-1].step == step else Row(step=step)
    measured = last.model_copy(update={"valid_loss": finite(loss), "valid_accuracy": finite(accuracy)})
    return [*(rows[:-1] if rows and rows[-1].step == step else rows), measured]


def progress(step: int, rows: Sequence[Row]) -> int:
    """A number that grows with each finished step and each finished measurement of a job, and so with what it keeps."""
    measured = bool(rows) and rows[-1].step == step and rows[-1].valid_accuracy is not None
    return 2 * step + measured


def recent_loss(rows: Sequence[Row]) -> float | None:
    """The mean training loss of the last steps that had one."""
    known = [row.train_loss for row in rows[-RECENT_STEPS:] if row.train_loss is not None]
    return sum(known) / len(known) if known else None


def as_csv(rows: Iterable[Row]) -> str:
    lines = [",".join(map(_cell, (row.step, row.train_loss, row.train_accuracy, row.valid_loss, row.valid_accuracy)))
             for row in rows]  # fmt: skip
    return "\n".join([",".join(CSV_COLUMNS), *lines]) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.5f}"
