"""What every source can do, and the two readers built on it.

Implemented by one module per scheme; used by `fetch` and `inspect` inside a thread. A source is opened at
an immutable revision: what it lists and streams belongs to that revision or it raises. All methods block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO, Protocol

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile

CHUNK_BYTES = 256 * 1024


class Source(Protocol):
    """Files at one revision of one place."""

    @property
    def where(self) -> str:
        """The place in words, without credentials."""

    @property
    def revision(self) -> str:
        """Names this content and no other: a commit, a manifest digest, a hash of the listing."""

    def list_files(self) -> Sequence[RemoteFile]:
        """All files at the top of the place."""

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes of a listed file from `start`; may end early when the other side does. Raises ArtifactError."""

    def close(self) -> None:
        """Gives connections back."""


def read_range(source: Source, name: str, start: int, length: int) -> bytes:
    """Exactly `length` bytes of a listed file. Raises ArtifactError, CorruptArtifact when they are not there."""
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
    """The file is no longer the one that was listed."""
    return ArtifactError(
        FailureReason.SOURCE_UNAVAILABLE, f"{where}: {name} changed while it was read; it is read again from the start."
    )
