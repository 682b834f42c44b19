"""What a job is asked to do, with all numbers resolved, and where its files are. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from lorapool_api.common import duration_s
from lorapool_api.tuning.finetunejob import Checkpoints, LoraSettings, TrainingData, TrainingSettings
from lorapool_api.tuning.states import RunState
from lorapool_trainer.jobs.validation import StoppingRule

ADAPTER = "adapter"
"""In the folder of a job: that of its result."""


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
