"""Login by API key: a signed cookie that names the key's Secret, and a limit on failed attempts.

The cookie is bound to the key's present value: a key that is revoked, changed or expired ends its sessions at once. It
has nothing secret in it.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from lorapool_gateway.routing.auth import ApiKey, KeyTable
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import KeySource
from lorapool_ledger.api.signing import Signer

COOKIE = "lorapool_session"
SESSION_S = 3600
"""A session ends after an hour without a request."""
RENEW_S = 300
"""A cookie that is older is renewed."""
MAX_FAILURES = 10
FAILURES_WITHIN_S = 300
MAX_ADDRESSES = 10_000


@dataclass(frozen=True, slots=True)
class Session:
    key: ApiKey
    csrf: str
    """In every form that changes something; a page of another site cannot know it."""
    since_unix_s: int


class Sessions:
    def __init__(self, keys: KeySource, guard: KeyGuard, signer: Signer, *, now_unix_s: Callable[[], float]) -> None:
        self._keys = keys
        self._guard = guard
        self._signer = signer
        self._now_unix_s = now_unix_s
        self._table: KeyTable | None = None
        self._by_uid: dict[str, ApiKey] = {}

    def begin(self, presented: str) -> Session:
        """Raises UnauthenticatedError, UnavailableError."""
        key = self._guard.authenticate(f"Bearer {presented.strip()}")
        return Session(key, secrets.token_urlsafe(16), int(self._now_unix_s()))

    def cookie(self, session: Session) -> str:
        value = {"key": session.key.uid, "csrf": session.csrf, "since": session.since_unix_s}
        return self._signer.sign(value, bound_to=session.key.sha256)

    def read(self, cookie: str) -> Session | None:
        """The session of a cookie; None if there is none or it has ended. Raises UnauthenticatedError, too."""
        uid = self._signer.peek(cookie).get("key")
        key = self._key(uid) if isinstance(uid, str) else None
        value = self._signer.read(cookie, bound_to=key.sha256) if key is not None else None
        if key is None or value is None or self._now_unix_s() - value["since"] > SESSION_S:
            return None
        return Session(self._guard.again(key), value["csrf"], value["since"])

    def renewed(self, session: Session) -> Session | None:
        """The session with a new time if its cookie is due for renewal."""
        now = int(self._now_unix_s())
        if now - session.since_unix_s < RENEW_S:
            return None
        return Session(session.key, session.csrf, now)

    def _key(self, uid: str) -> ApiKey | None:
        if self._keys.table is not self._table:
            self._table = self._keys.table
            self._by_uid = {key.uid: key for key in self._table if key.uid}
        return self._by_uid.get(uid)


class LoginLimit:
    """Failed logins by client address."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """How long this address has to wait; 0: it may try."""
        failures = self._failures.get(address, deque())
        while failures and self._clock() - failures[0] > FAILURES_WITHIN_S:
            failures.popleft()
        return FAILURES_WITHIN_S - (self._clock() - failures[0]) if len(failures) >= MAX_FAILURES else 0.0

    def failed(self, address: str) -> None:
        self._failures.setdefault(address, deque()).append(self._clock())
        self._failures.move_to_end(address)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
