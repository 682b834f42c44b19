"""The files of a job, read: its examples as tokens, and the adapter whose training it continues."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorapool_artifacts.datasets.errors import DatasetError
from lorapool_artifacts.errors import ArtifactError
from lorapool_trainer.data.dataset import Dataset, FileOptions, make_dataset, read_training, read_validation
from lorapool_trainer.data.encoder import Encoder
from lorapool_trainer.jobs.initial import InitialAdapter, InitialAdapterError, read_initial
from lorapool_trainer.jobs.order import JobFiles, JobOrder


@dataclass(frozen=True, slots=True)
class JobInput:
    """What a job's files hold."""

    dataset: Dataset
    initial: InitialAdapter | None
    """The adapter whose training is continued."""


def read_input(order: JobOrder, files: JobFiles, encoder: Encoder, most_tokens: int) -> JobInput:
    """Reads, checks and tokenizes a job's files.

    Raises DatasetError, InitialAdapterError, ArtifactError where another attempt may succeed, and OSError.
    """
    files.restore()
    initial, encoder = _initial(files, encoder)
    return JobInput(_dataset(order, files, encoder, most_tokens), initial)


def _initial(files: JobFiles, encoder: Encoder) -> tuple[InitialAdapter | None, Encoder]:
    """The adapter whose training is continued, and the encoder with its chat template and tokens."""
    try:
        folder = files.initial()
        return (None, encoder) if folder is None else (read_initial(folder), encoder.of_adapter(folder))
    except ArtifactError as error:
        if error.transient:
            raise
        raise InitialAdapterError(error.message.removesuffix(".")) from error


def _dataset(order: JobOrder, files: JobFiles, encoder: Encoder, most_tokens: int) -> Dataset:
    data = order.data
    options = FileOptions(data.training.format, data.loss_on, most_tokens, data.training.digest)
    with files.training() as file:
        training = read_training(file, encoder, options)
    opened = files.validation()
    if opened is None or data.validation is None:
        return make_dataset(training, None, order.fraction, order.training.seed)
    with opened as file:
        own = replace(options, data_format=data.validation.format, digest=data.validation.digest)
        try:
            validation = read_validation(file, encoder, own)
        except DatasetError as error:
            raise error.of_validation() from error
    return make_dataset(training, validation, 0.0, order.training.seed)
