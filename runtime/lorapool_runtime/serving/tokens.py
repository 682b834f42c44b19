"""The bearer tokens that requests may carry, known by their SHA-256 only, and the proofs that polls carry instead.

They come from a setting, or from a file that is read again when it changes: while a token is replaced, the file lists
the old and the new one, and no request is refused.
"""

from __future__ import annotations

import hmac
import logging
import re
from pathlib import Path
from typing import Protocol

from lorapool_api.protocol import ENV_TOKEN_SHA256_FILE, token_sha256
from lorapool_api.settings import SettingsError
from lorapool_api.trust.mounted_files import Stamp, stamp_of, why_unreadable
from lorapool_api.trust.poll_proof import Challenge
from lorapool_runtime.clock import Clock

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 5.0
"""Longest time that a token which was removed from the file stays valid. A refused token is looked up at once."""
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


class TokenSettings(Protocol):
    """Of the settings of a runtime or a trainer."""

    @property
    def needs_token(self) -> bool: ...

    @property
    def token_sha256(self) -> str | None: ...

    @property
    def token_sha256_file(self) -> Path | None: ...

    @property
    def pod_uid(self) -> str | None: ...


class BearerTokens:
    """Raises SettingsError when the settings name a file that cannot be used at the start."""

    def __init__(self, settings: TokenSettings, clock: Clock) -> None:
        self._required = settings.needs_token
        self._file = settings.token_sha256_file
        self._pod_uid = settings.pod_uid
        self._clock = clock
        self._checked_s = clock.now_s()
        self._read: Stamp | None = None
        self._hashes = frozenset({settings.token_sha256} if settings.token_sha256 else ())
        if self._file is not None:
            self._read = stamp_of(self._file)
            self._hashes = _hashes_in(self._file)

    def accepts(self, authorization: str) -> bool:
        """Whether the value of an Authorization header holds a valid token, or none is needed."""
        if not self._required:
            return True
        self._read_if_due()
        return self._is_valid(authorization) or (self._read_again() and self._is_valid(authorization))

    def answer(self, challenge: Challenge, body: bytes) -> str | None:
        """The proof for a poll's response; None for a poll of another pod, or by a poller without a valid token."""
        digest = self._hash_behind(challenge)
        return challenge.answer(digest, body) if digest is not None else None

    def accepts_poll(self, challenge: Challenge) -> bool:
        """Whether the poll means this pod and its poller has a valid token."""
        self._read_if_due()
        if self._hash_behind(challenge) is not None:
            return True
        return self._read_again() and self._hash_behind(challenge) is not None

    def _hash_behind(self, challenge: Challenge) -> str | None:
        if challenge.pod_uid != self._pod_uid:
            return None
        return next((known for known in self._hashes if challenge.is_from(known)), None)

    def _read_if_due(self) -> None:
        if self._clock.now_s() - self._checked_s >= CHECK_INTERVAL_S:
            self._read_again()

    def _is_valid(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        given = token_sha256(token.strip()) if token.isascii() else ""
        matches = [hmac.compare_digest(given, known) for known in self._hashes]  # all, whichever matches
        return scheme.lower() == "bearer" and any(matches)

    def _read_again(self) -> bool:
        """Reads the file if it has changed; true if it was read. The last valid hashes are kept while it is broken."""
        self._checked_s = self._clock.now_s()
        if self._file is None or (stamp := stamp_of(self._file)) == self._read:
            return False
        self._read = stamp
        try:
            self._hashes = _hashes_in(self._file)
        except SettingsError as error:
            log.error("%s; the tokens that were read before stay valid", error)
            return False
        log.info("the tokens were read again", extra={"tokens": len(self._hashes)})
        return True


def _hashes_in(file: Path) -> frozenset[str]:
    try:
        lines = file.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{ENV_TOKEN_SHA256_FILE}: {file} cannot be read: {why_unreadable(error)}") from None
    if not lines or not all(_SHA256.match(line) for line in lines):
        raise SettingsError(
            f"{ENV_TOKEN_SHA256_FILE}: {file} must have the SHA-256 (64 lower-case hex digits) of one token per line"
        )
    return frozenset(lines)
