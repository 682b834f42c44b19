"""Master tokens in files that are read again when they change, and the bearer tokens of runtimes derived from one.

During a rotation the file has two lines: the current master token, then the previous one. Clients try the tokens in
that order, and runtimes accept both, so that no process has to restart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lorapool_api.protocol import runtime_token
from lorapool_api.settings import SettingsError
from lorapool_api.trust.mounted_files import Stamp, stamp_of, why_unreadable

log = logging.getLogger(__name__)

MASTER_TOKEN_MIN_CHARS = 32
MAX_MASTER_TOKENS = 2
RECHECK_S = 1.0
"""A change of the file is noticed after at most this long."""


def read_master_tokens(path: Path) -> tuple[str, ...]:
    """The release's master tokens, the current one first. Raises SettingsError, which never shows one."""
    try:
        tokens = tuple(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the master token file {path} cannot be read: {why_unreadable(error)}") from None
    if not tokens or min(map(len, tokens)) < MASTER_TOKEN_MIN_CHARS:
        raise SettingsError(f"a master token in {path} is shorter than {MASTER_TOKEN_MIN_CHARS} characters")
    if len(tokens) > MAX_MASTER_TOKENS:
        raise SettingsError(f"{path} has {len(tokens)} master tokens; it may have the current and the previous one")
    return tokens


class MasterTokens:
    """The master tokens as their file has them."""

    def __init__(
        self, masters: Sequence[str], file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`file`: where later changes are read from."""
        self._masters = tuple(masters)
        self._file = file
        self._clock = clock
        self._stamp: Stamp | None = None  # the file may have changed since it was read
        self._checked_s = clock()

    @classmethod
    def from_file(cls, path: Path) -> MasterTokens:
        """Raises SettingsError if the file has no valid master token."""
        return cls(read_master_tokens(path), path)

    def current(self) -> tuple[str, ...]:
        """The current token, then the previous one if there is one."""
        if self._file is not None and self._clock() - self._checked_s >= RECHECK_S:
            self._checked_s = self._clock()
            self._read_if_changed(self._file)
        return self._masters

    def _read_if_changed(self, file: Path) -> None:
        """Keeps the tokens that were read before when the changed file cannot be used."""
        stamp = stamp_of(file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            before, self._masters = self._masters, read_master_tokens(file)
            if self._masters != before:
                log.info("read the changed master token")
        except SettingsError as error:
            log.error("cannot use the changed master token; the old one stays in force", extra={"error": str(error)})


class RuntimeTokens:
    """`of(uid)` are the tokens of one base's runtimes."""

    def __init__(
        self, masters: Sequence[str], file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`file`: where later changes are read from."""
        self._masters = MasterTokens(masters, file, clock=clock)

    @classmethod
    def from_file(cls, path: Path) -> RuntimeTokens:
        """Raises SettingsError if the file has no valid master token."""
        return cls(read_master_tokens(path), path)

    def of(self, base_uid: str) -> tuple[str, ...]:
        """The bearer tokens of this base's runtimes, the current one first."""
        return tuple(runtime_token(master, base_uid) for master in self._masters.current())
