"""The files of FineTuneJobs in the release's store: data sets are checked there, and what a job wrote is deleted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import time
from collections.abc import Iterator
from typing import NamedTuple

from lorapool_api.common import FailureReason
from lorapool_api.store_protocol import StoreAccess, StoreGrant
from lorapool_api.tuning.finetunejob import MIN_EXAMPLES, DataFile, LossOn
from lorapool_api.tuning.states import JobFailure
from lorapool_artifacts.datasets.errors import DatasetError
from lorapool_artifacts.datasets.reader import MIN_VALIDATION_EXAMPLES, check_dataset
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.sources.store_client import StoreClient
from lorapool_operator.effects.store_grants import StoreGrants
from lorapool_operator.effects.tuning import FilesError
from lorapool_operator.world.cluster_cache import Meta
from lorapool_operator.world.tuning import DataFinding, TuningObject

STORE_ACCESS_S = 24 * 3600
"""How long a trainer may use the store with one token; the plan renews it after a quarter of this."""
CHECK_ACCESS_S = 3600
BUFFER_BYTES = 1 << 20
GONE = (FailureReason.SOURCE_NOT_FOUND, FailureReason.UNAUTHORIZED, FailureReason.SOURCE_NOT_PERMITTED)


class _Checked(NamedTuple):
    examples: int
    digest: str


class StoreFiles:
    """Uses the store with a token for each purpose."""

    def __init__(self, grants: StoreGrants) -> None:
        self._grants = grants

    async def check(self, job: TuningObject) -> DataFinding:
        """Checks the structure of a job's data set, in a thread. Never raises."""
        return await asyncio.to_thread(self._check, job)

    async def delete(self, job: Meta, *, keep_result: bool) -> None:
        """Deletes everything that was written for a job, or all but its result. Raises FilesError."""
        await asyncio.to_thread(self._delete, job, keep_result)

    def access(self, job: TuningObject, initial_uri: str | None) -> StoreAccess:
        """Returns access to the files that the job's trainer reads and writes, and to no other."""
        read = [_name(file.uri) for file in _files(job)]
        if initial_uri is not None and initial_uri.startswith("store://"):
            read.append(f"{_name(initial_uri)}/")
        expires = int(time.time()) + STORE_ACCESS_S
        return self._grants.access(StoreGrant(read=tuple(read), write=_written(job.meta), expires_unix_s=expires))

    def _check(self, job: TuningObject) -> DataFinding:
        data = job.spec.data
        try:
            with self._client(read=tuple(_name(file.uri) for file in _files(job))) as client:
                training = _checked(client, data.training, data.loss_on, MIN_EXAMPLES)
                validation = None
                if data.validation is not None:
                    validation = _checked_validation(client, data.validation, data.loss_on)
        except DatasetError as error:
            return DataFinding(failure=error.reason, message=error.message, line=error.line)
        except ArtifactError as error:
            return _unreadable(error)
        return DataFinding(
            examples=training.examples,
            digest=training.digest,
            validation_examples=validation.examples if validation is not None else 0,
            validation_digest=validation.digest if validation is not None else None,
        )

    def _delete(self, job: Meta, keep_result: bool) -> None:
        work, result = (name.partition("/")[2] for name in _written(job))
        try:
            with self._client(write=_written(job)) as client:
                for key in (work,) if keep_result else (work, result):
                    client.delete(job.namespace, key)
        except ArtifactError as error:
            raise FilesError(f"the files of {job.namespace}/{job.name} are not deleted yet: {error.message}") from error

    @contextlib.contextmanager
    def _client(self, *, read: tuple[str, ...] = (), write: tuple[str, ...] = ()) -> Iterator[StoreClient]:
        grant = StoreGrant(read=read, write=write, expires_unix_s=int(time.time()) + CHECK_ACCESS_S)
        with contextlib.closing(StoreClient(self._grants.access(grant))) as client:
            yield client


def _files(job: TuningObject) -> list[DataFile]:
    data = job.spec.data
    return [data.training, *([data.validation] if data.validation is not None else [])]


def _name(uri: str) -> str:
    """Returns `<namespace>/<key>` of a store:// URI."""
    return uri.removeprefix("store://")


def _written(job: Meta) -> tuple[str, str]:
    """Returns the prefixes below which a job's trainer writes: its work, then its result."""
    return f"{job.namespace}/jobs/{job.uid}/", f"{job.namespace}/adapters/{job.uid}/"


def _checked(client: StoreClient, file: DataFile, loss_on: LossOn, minimum: int) -> _Checked:
    """Checks one file as it arrives. Raises DatasetError, ArtifactError."""
    namespace, _, key = _name(file.uri).partition("/")
    size = client.head(namespace, key).size
    stream = _HashedStream(client.stream(namespace, key))
    try:
        found = check_dataset(io.BufferedReader(stream, BUFFER_BYTES), file.format, loss_on, minimum)
    except DatasetError:
        if stream.ended and stream.size < size:
            raise _cut_off(file) from None
        raise
    if stream.size < size:
        raise _cut_off(file)
    if file.digest is not None and stream.digest != file.digest:
        message = f"{file.uri} has the digest {stream.digest}, not the one that the job names: upload it again."
        raise DatasetError(message)
    return _Checked(found.examples, stream.digest)


def _checked_validation(client: StoreClient, file: DataFile, loss_on: LossOn) -> _Checked:
    """Raises as `_checked` does, with words that say which file is meant."""
    try:
        return _checked(client, file, loss_on, MIN_VALIDATION_EXAMPLES)
    except DatasetError as error:
        raise error.of_validation() from error


def _cut_off(file: DataFile) -> ArtifactError:
    return ArtifactError(FailureReason.SOURCE_UNAVAILABLE, f"{file.uri} arrived in part only; it is read again.")


def _unreadable(error: ArtifactError) -> DataFinding:
    """A file that is missing and one that is another namespace's have one answer."""
    if error.reason in GONE:
        return DataFinding(failure=JobFailure.INVALID_DATASET, message=f"{error.message} Name a file that exists.")
    return DataFinding(failure=JobFailure.SOURCE_UNAVAILABLE, message=error.message)


class _HashedStream(io.RawIOBase):
    """The chunks of a download as a file, with the hash of what was read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""
        self._hash = hashlib.sha256()
        self.size = 0
        self.ended = False

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # a writable buffer
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                self.ended = True
                return 0
            self._hash.update(chunk)
            self.size += len(chunk)
            self._rest = chunk
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
