"""A job's files in the release's store, mirrored in a folder of this pod.

Checkpoints, pictures and the report are below the job's workspace, the adapter below its output. Files are written here
first and then stored; the report of an ended job comes last, since it says that all else is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from lorapool_api.common import FailureReason
from lorapool_api.tuning.trainer_protocol import TrainerJob
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHAT_FILES, RemoteFile, digest_of, files_of
from lorapool_trainer.jobs.checkpoint import FOLDER as CHECKPOINTS
from lorapool_trainer.jobs.live import CURVE_FILE, METRICS_FILE
from lorapool_trainer.jobs.order import ADAPTER

log = logging.getLogger(__name__)

REPORT_FILE = "report.json"
INITIAL = "initial"
"""Folder of the adapter whose training is continued."""
STORED_AS = {name: f"result_files/{name}" for name in (METRICS_FILE, CURVE_FILE)}


class Listed(Protocol):
    @property
    def key(self) -> str: ...


class ObjectStore(Protocol):
    """Of the store's client, what a job needs. Blocks; raises ArtifactError."""

    def list(self, namespace: str, prefix: str = "") -> Sequence[Listed]: ...

    def get(self, namespace: str, key: str) -> bytes: ...

    def stream(self, namespace: str, key: str) -> Iterator[bytes]: ...

    def put(self, namespace: str, key: str, data: bytes) -> object: ...

    def delete(self, namespace: str, key: str) -> None: ...


class StoreFiles:
    """`JobFiles` in the store. The client may be replaced by one with a newer token at any time."""

    def __init__(self, folder: Path, job: TrainerJob, client: ObjectStore) -> None:
        self._folder, self._job, self.client = folder, job, client
        self._unsaved: dict[str, None] = {}
        """Names that the store did not take yet."""
        self._workspace, self._output = location(job.workspace), location(job.output)

    @property
    def folder(self) -> Path:
        return self._folder

    def training(self) -> BinaryIO:
        return self._download(self._job.data.training.uri, "training.jsonl")

    def validation(self) -> BinaryIO | None:
        found = self._job.data.validation
        return None if found is None else self._download(found.uri, "validation.jsonl")

    def initial(self) -> Path | None:
        """Fetches the adapter, and raises ArtifactError if its digest is another one."""
        wanted = self._job.init_from
        if wanted is None:
            return None
        namespace, key = location(wanted.source.uri)
        present = {item.key.removeprefix(f"{key}/") for item in self.client.list(namespace, f"{key}/")}
        if not {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= present:
            message = f"The files of {wanted.source.uri}, the adapter to continue, were deleted; name another adapter."
            raise ArtifactError(FailureReason.SOURCE_NOT_FOUND, message)
        folder = self._folder / INITIAL
        folder.mkdir(parents=True, exist_ok=True)
        fetched = [
            self._fetched(namespace, f"{key}/{name}", folder / name)
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *CHAT_FILES)
            if name in present
        ]
        used = files_of(wanted.digest, fetched)
        if (found := digest_of(used)) != wanted.digest:
            message = (
                f"The files of {wanted.source.uri}, the adapter to continue, have the digest {found}, but the job was "
                f"given {wanted.digest}; create another job to continue the present files."
            )
            raise ArtifactError(FailureReason.DIGEST_MISMATCH, message)
        for file in {*fetched} - {*used}:  # the digest does not cover them
            (folder / file.name).unlink()
        return folder

    def _fetched(self, namespace: str, key: str, path: Path) -> RemoteFile:
        hashed = hashlib.sha256()
        with path.open("wb") as out:
            for chunk in self.client.stream(namespace, key):
                hashed.update(chunk)
                out.write(chunk)
        return RemoteFile(path.name, path.stat().st_size, hashed.hexdigest())

    def restore(self) -> None:
        """Fetches checkpoints that are not here yet."""
        self._folder.mkdir(parents=True, exist_ok=True)
        namespace, key = self._workspace
        names: dict[str, list[str]] = {}
        for item in self.client.list(namespace, f"{key}/{CHECKPOINTS}/"):
            name, _, file = item.key.removeprefix(f"{key}/{CHECKPOINTS}/").partition("/")
            names.setdefault(name, []).append(file)
        for name, files in names.items():
            self._restore_folder(f"{CHECKPOINTS}/{name}", files)

    def _restore_folder(self, name: str, files: list[str]) -> None:
        target = self._folder / name
        if target.is_dir():
            return
        writing = target.with_name(f".fetching-{target.name}")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        namespace, key = self._workspace
        for file in files:
            with (writing / file).open("wb") as out:
                out.writelines(self.client.stream(namespace, f"{key}/{name}/{file}"))
        writing.rename(target)

    def save(self, *names: str) -> None:
        """What the store refuses now is stored by a later `flush`, so that training goes on meanwhile."""
        self._unsaved |= dict.fromkeys(names)
        try:
            self.flush()
        except ArtifactError as error:
            log.warning("the store refused", extra={"job": self._job.display, "error": error.message})

    def flush(self) -> None:
        """Stores what was not stored yet. Raises ArtifactError."""
        for name in list(self._unsaved):
            path = self._folder / name
            if not path.exists():  # a checkpoint that was superseded meanwhile
                del self._unsaved[name]
                continue
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                namespace, key = self._key(name, file.name if path.is_dir() else "")
                self.client.put(namespace, key, file.read_bytes())
            del self._unsaved[name]

    def drop(self, name: str) -> None:
        namespace, key = self._key(name, "")
        with contextlib.suppress(ArtifactError):  # it is deleted with the job at the latest
            self.client.delete(namespace, f"{key}/")

    def _key(self, name: str, file: str) -> tuple[str, str]:
        if name == ADAPTER:
            namespace, key = self._output
            return namespace, f"{key}/{file}"
        namespace, key = self._workspace
        return namespace, "/".join(filter(None, (key, STORED_AS.get(name, name), file)))

    def _download(self, uri: str, name: str) -> BinaryIO:
        """To a file, so that data sets larger than memory are read line by line."""
        namespace, key = location(uri)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.writelines(self.client.stream(namespace, key))
        return path.open("rb")

    # --- the report -----------------------------------------------------------------------

    def read_report(self) -> bytes | None:
        """What an earlier trainer wrote when the job ended; None if it did not end."""
        namespace, key = self._workspace
        stored = {item.key for item in self.client.list(namespace, f"{key}/")}
        return self.client.get(namespace, f"{key}/{REPORT_FILE}") if f"{key}/{REPORT_FILE}" in stored else None

    def write_report(self, text: str) -> None:
        namespace, key = self._workspace
        self.client.put(namespace, f"{key}/{REPORT_FILE}", text.encode())

    def add_events(self, number: int, text: str) -> None:
        """One immutable part of the job's events."""
        namespace, key = self._workspace
        self.client.put(namespace, f"{key}/events/{number:010d}.jsonl", text.encode())

    def event_parts(self) -> int:
        namespace, key = self._workspace
        return len(self.client.list(namespace, f"{key}/events/"))


def location(uri: str) -> tuple[str, str]:
    """Namespace and key of a `store://` URI, without a slash at the end. Raises ArtifactError for any other one."""
    scheme, _, rest = uri.partition("://")
    namespace, _, key = rest.strip("/").partition("/")
    if scheme != "store" or not namespace or not key:
        message = f"{uri} cannot be read by a trainer; upload the file and use store://<namespace>/<key>."
        raise ArtifactError(FailureReason.INVALID_SOURCE, message)
    return namespace, key
