"""The files of a job to the examples that it trains on and those that it is measured with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar, cast

from lorapool_api.tuning.finetunejob import MIN_EXAMPLES, DataFormat, LossOn
from lorapool_api.tuning.states import JobFailure
from lorapool_artifacts.datasets.errors import DatasetError
from lorapool_artifacts.datasets.reader import (
    MIN_VALIDATION_EXAMPLES,
    check_count,
    read_examples,
)
from lorapool_trainer.data.encoder import Encoder, TokenExample


class HasIds(Protocol):
    @property
    def ids(self) -> tuple[int, ...]: ...


E = TypeVar("E", bound=HasIds)


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How one file is read."""

    data_format: DataFormat = DataFormat.AUTO
    loss_on: LossOn = LossOn.ASSISTANT
    max_tokens: int = 1024
    """A longer example is refused."""
    digest: str | None = None
    """Expected `sha256:…` of the file; None accepts any."""


@dataclass(frozen=True, slots=True)
class EncodedFile:
    examples: tuple[TokenExample, ...]
    digest: str
    """`sha256:…` of its bytes."""


@dataclass(frozen=True, slots=True)
class Dataset:
    training: tuple[TokenExample, ...]
    validation: tuple[TokenExample, ...]
    """Empty: nothing is measured."""
    digest: str
    validation_digest: str | None
    """None without a file of its own."""

    @property
    def train_tokens(self) -> int:
        return sum(len(example.ids) for example in self.training)

    @property
    def counted_tokens(self) -> int:
        return sum(sum(example.counted) for example in self.training)


def encode_file(file: BinaryIO, encoder: Encoder, options: FileOptions, minimum: int) -> EncodedFile:
    """Reads, checks and tokenizes a whole file. Blocks. Raises DatasetError for the first line at fault."""
    reader = _HashingReader(file)
    examples = tuple(_encoded(reader, encoder, options))
    check_count(len(examples), minimum)
    digest = f"sha256:{reader.hash.hexdigest()}"
    if options.digest not in (None, digest):
        raise DatasetError(f"The file has the digest {digest}, but the job names {options.digest}; upload it again.")
    return EncodedFile(examples, digest)


def make_dataset(training: EncodedFile, validation: EncodedFile | None, fraction: float, seed: int) -> Dataset:
    """Splits `fraction` of the training examples off where there is no validation file. The seed decides which."""
    if validation is not None or fraction <= 0:
        own = validation.examples if validation is not None else ()
        return Dataset(training.examples, own, training.digest, validation.digest if validation is not None else None)
    taken = split_indices(len(training.examples), fraction, seed)
    kept = [example for index, example in enumerate(training.examples) if index not in taken]
    return Dataset(tuple(kept), tuple(training.examples[index] for index in sorted(taken)), training.digest, None)


def split_indices(count: int, fraction: float, seed: int) -> frozenset[int]:
    """Positions of the validation examples: at least one, and never all."""
    size = min(count - 1, max(1, round(count * fraction)))
    return frozenset(random.Random(f"validation {seed}").sample(range(count), size))


def read_training(file: BinaryIO, encoder: Encoder, options: FileOptions) -> EncodedFile:
    return encode_file(file, encoder, options, MIN_EXAMPLES)


def read_validation(file: BinaryIO, encoder: Encoder, options: FileOptions) -> EncodedFile:
    return encode_file(file, encoder, options, MIN_VALIDATION_EXAMPLES)


def slices(examples: Sequence[E], tokens: int) -> Iterator[Sequence[E]]:
    """The examples in consecutive groups of up to so many tokens, or of one longer example."""
    begin, size = 0, 0
    for place, example in enumerate(examples):
        if place > begin and size + len(example.ids) > tokens:
            yield examples[begin:place]
            begin, size = place, 0
        size += len(example.ids)
    if begin < len(examples):
        yield examples[begin:]


def _encoded(reader: _HashingReader, encoder: Encoder, options: FileOptions) -> Iterator[TokenExample]:
    for line, example in read_examples(cast(BinaryIO, reader), options.data_format, options.loss_on):
        found = encoder.encode(example, line)
        if len(found.ids) > options.max_tokens:
            raise DatasetError(
                f"Example {line} has {len(found.ids)} tokens, more than the {options.max_tokens} of maxTokens; "
                "shorten it or raise maxTokens. Examples are never cut.",
                line=line,
                reason=JobFailure.EXAMPLE_TOO_LONG,
            )
        yield found


class _HashingReader:
    """Hashes what is read through it. Only `readline` is used."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def readline(self, size: int = -1) -> bytes:
        line = self._file.readline(size)
        self.hash.update(line)
        return line
