"""Opens files below a root folder and follows symbolic links as long as they stay below it.

Volumes have such links: the Hugging Face cache links `snapshots/<commit>/…` to `blobs/…`, and Kubernetes links the
files of a ConfigMap to `..data/…`. Each part of a path is opened relative to the folder before it with O_NOFOLLOW, and
the parts of a link's target likewise; `..` returns to a folder that is open already. A concurrent change of the volume
can therefore never lead out of the root, and neither `openat2` nor a second look at a path is needed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

MAX_LINKS = 40
"""Links followed for one path, as in the kernel."""

_INNER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class LinkLeadsOutError(Exception):
    """A symbolic link leads out of the root, or to nothing."""


class FolderBeneath:
    """An open folder below a root, with the folders between them."""

    def __init__(self, root: Path) -> None:
        """Opens the root, which is trusted. Absolute links are followed only below `/`. Raises OSError."""
        self._descriptors = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        self._absolute_links = str(root) == "/"

    def enter(self, parts: Sequence[str]) -> None:
        """Moves to a folder below this one. Raises LinkLeadsOutError and OSError."""
        opened = self._open("/".join(parts), _INNER)
        self.close()
        self._descriptors = opened

    def become_root(self) -> None:
        """Links do not leave this folder from now on."""
        _close(self._descriptors[:-1])
        del self._descriptors[:-1]

    def open_file(self, path: str) -> int:
        """A new descriptor of a file, by its path relative to this folder. Raises LinkLeadsOutError and OSError."""
        *folders, file = self._open(path, _FILE)
        _close(folders)
        return file

    def open_folder(self, path: str) -> int:
        """A new descriptor, for `os.scandir`, of a folder by its path. Raises LinkLeadsOutError and OSError."""
        opened = self._open(path, _INNER)
        try:
            return os.open(".", _FOLDER, dir_fd=opened[-1])
        finally:
            _close(opened)

    def close(self) -> None:
        _close(self._descriptors)
        self._descriptors = []

    def _open(self, path: str, last: int) -> list[int]:
        """Descriptors from the root to `path`, the last one opened with these flags."""
        opened = [os.dup(descriptor) for descriptor in self._descriptors]
        pending, links = path.split("/")[::-1], 0
        try:
            while pending:
                part = pending.pop()
                if part == "..":
                    _leave(opened)
                elif part not in ("", "."):
                    target = _step(opened, part, _INNER if pending else last, followed=links > 0)
                    if target is not None:
                        links += 1
                        self._follow(target, opened, links)
                        pending += target.split("/")[::-1]
            return opened
        except BaseException:
            _close(opened)
            raise

    def _follow(self, target: str, opened: list[int], links: int) -> None:
        """Prepares following a link: an absolute one begins at the root."""
        if links > MAX_LINKS:
            raise LinkLeadsOutError
        if target.startswith("/"):
            if not self._absolute_links:
                raise LinkLeadsOutError
            _close(opened[1:])
            del opened[1:]


def _step(opened: list[int], part: str, flags: int, *, followed: bool) -> str | None:
    """Opens the next part of a path, or returns the target if it is a link. `followed`: a link was followed before."""
    try:
        opened.append(os.open(part, flags, dir_fd=opened[-1]))
        return None
    except FileNotFoundError:
        if followed:
            raise LinkLeadsOutError from None
        raise
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        try:
            return os.readlink(part, dir_fd=opened[-1])
        except OSError:  # it is no link
            raise error from None


def _leave(opened: list[int]) -> None:
    if len(opened) == 1:
        raise LinkLeadsOutError
    os.close(opened.pop())


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
