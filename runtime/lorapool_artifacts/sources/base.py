"""The interface of sources, and functions that read from any of them.

A source is opened at an immutable revision: everything that it lists and streams belongs to that revision, otherwise it
raises ArtifactError. All methods block and are called in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO, Protocol

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile

CHUNK_BYTES = 256 * 1024


class Source(Protocol):
    """The files of one artifact at one revision."""

    @property
    def where(self) -> str:
        """The source for messages, without credentials."""

    @property
    def revision(self) -> str:
        """An identifier of exactly this content: a commit, a manifest digest or a hash of the listing."""

    def list_files(self) -> Sequence[RemoteFile]:
        """All files of the folder. Those in sub folders have their path as their name; they serve messages, and a
        source may leave them out where the folder itself has weights."""

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes of a listed file from `start`; may end early when the connection does. Raises ArtifactError."""

    def close(self) -> None:
        """Closes connections and files."""


def files_below(prefix: str, files: Sequence[RemoteFile]) -> Sequence[RemoteFile]:
    """The files whose names begin with the prefix, without it. No prefix: all."""
    return [replace(file, name=file.name[len(prefix) :]) for file in files if file.name.startswith(prefix)]


def read_range(source: Source, name: str, start: int, length: int) -> bytes:
    """Exactly `length` bytes of a listed file. Raises ArtifactError (CorruptArtifact) when the file is shorter."""
    parts: list[bytes] = []
    missing = length
    for chunk in source.stream(name, start, length):
        parts.append(chunk[:missing])
        missing -= len(parts[-1])
        if missing <= 0:
            break
    if missing > 0:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT,
            f"{source.where}: {name} ends {missing} bytes before it should; upload it again.",
        )
    return b"".join(parts)


def download(source: Source, name: str, into: BinaryIO) -> int:
    """Writes a listed file to `into` and returns its length. Raises ArtifactError."""
    count = 0
    for chunk in source.stream(name):
        into.write(chunk)
        count += len(chunk)
    return count


def changed(where: str, name: str) -> ArtifactError:
    """The error of a file that changed after it was listed."""
    return ArtifactError(
        FailureReason.SOURCE_UNAVAILABLE, f"{where}: {name} changed while it was read; it is read again from the start."
    )
