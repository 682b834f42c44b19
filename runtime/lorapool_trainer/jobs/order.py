"""What a job is asked to do, with all numbers resolved, and where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from lorapool_api.common import duration_s
from lorapool_api.tuning.finetunejob import ALL_LINEAR, Checkpoints, LoraSettings, TrainingData, TrainingSettings
from lorapool_api.tuning.states import RunState
from lorapool_trainer.engine import JobSettings, Schedule
from lorapool_trainer.jobs.validation import StoppingRule


class JobFiles(Protocol):
    """The files of one job. Everything that the trainer writes is in `folder`, which a store may mirror. Blocks."""

    @property
    def folder(self) -> Path: ...

    def training(self) -> BinaryIO: ...

    def validation(self) -> BinaryIO | None: ...

    def initial(self) -> Path | None:
        """The folder of the adapter whose training is continued. Raises ArtifactError, also for another digest."""

    def restore(self) -> None:
        """Brings what an earlier trainer stored into the folder."""

    def save(self, *names: str) -> None:
        """Stores files and folders of the folder that were written."""

    def drop(self, name: str) -> None:
        """Deletes a file or folder from the store; it is gone from the folder."""


@dataclass(frozen=True, slots=True)
class JobOrder:
    """One job, as a person or the operator gave it. `training` holds numbers, not None, and so does `lora`, unless an
    adapter is continued, whose numbers count."""

    uid: str
    display: str
    """`namespace/name`."""
    data: TrainingData
    lora: LoraSettings
    training: TrainingSettings
    checkpoints: Checkpoints
    priority: int = 50
    run: RunState = RunState.RUN
    created_unix_s: float = 0.0
    crashes: int = 0

    @property
    def tenant(self) -> str:
        return self.display.partition("/")[0]

    @property
    def fraction(self) -> float:
        return float(self.data.validation_fraction or 0)

    @property
    def checkpoint_every_s(self) -> float:
        return duration_s(self.checkpoints.every)

    @property
    def stopping(self) -> StoppingRule | None:
        rule = self.training.early_stopping
        return None if rule is None else StoppingRule(rule.patience, float(rule.min_delta))


def engine_settings(order: JobOrder) -> JobSettings:
    """The settings as the engine takes them. Raises ValueError for a number out of its range, or a missing one."""
    lora, training = order.lora, order.training
    if not (lora.rank and training.epochs and training.batch_size and training.learning_rate):
        raise ValueError("rank, epochs, batchSize and learningRate must be resolved to numbers")
    return JobSettings(
        rank=lora.rank,
        alpha=float(lora.alpha or 2 * lora.rank),
        dropout=float(lora.dropout),
        target_modules=named_targets(lora),
        epochs=training.epochs,
        max_steps=training.max_steps,
        batch_size=training.batch_size,
        learning_rate=float(training.learning_rate),
        schedule=Schedule(training.schedule.value),
        warmup=float(training.warmup),
        weight_decay=float(training.weight_decay),
        max_grad_norm=float(training.max_grad_norm),
        seed=training.seed,
    )


def named_targets(lora: LoraSettings) -> tuple[str, ...] | str:
    """As the engine takes them."""
    return ALL_LINEAR if ALL_LINEAR in lora.target_modules else tuple(lora.target_modules)
