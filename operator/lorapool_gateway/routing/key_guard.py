"""Whether the key of a request is valid now: when the request arrives, and each time it is about to be sent on."""

from __future__ import annotations

import time
from collections.abc import Callable

from lorapool_api.openai import UnavailableError
from lorapool_gateway.routing.auth import ApiKey, authenticate, check_again
from lorapool_gateway.routing.live_tables import KeySource

RETRY_AFTER_S = 10.0


class KeyGuard:
    def __init__(
        self,
        keys: KeySource,
        *,
        max_age_s: float | None = None,
        used: Callable[[str], None] = lambda key_id: None,
        known: Callable[[], bool] = lambda: True,
        now_unix_s: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_age_s`: keys that were not confirmed for longer are refused; None: they stay valid.

        `used(key_id)` is called for each request of a valid key. `known()`: whether the keys were read once; before,
        every request is refused with an error that may be repeated.
        """
        self._keys = keys
        self._max_age_s = max_age_s
        self._used = used
        self._known = known
        self._now_unix_s = now_unix_s
        self._clock = clock

    def authenticate(self, authorization: str | None) -> ApiKey:
        """The key that a header presents. Raises UnauthenticatedError, UnavailableError."""
        if not self._known():
            raise UnavailableError("API keys have not been read yet.", code="keys_unknown", retry_after_s=1)
        key = authenticate(self._keys.table, authorization, self._now_unix_s())
        self._refuse_when_stale()
        self._used(key.id)
        return key

    def again(self, key: ApiKey) -> ApiKey:
        """The key with its present permissions. Raises UnauthenticatedError, UnavailableError."""
        found = check_again(self._keys.table, key, self._now_unix_s())
        self._refuse_when_stale()
        return found

    def _refuse_when_stale(self) -> None:
        if self._max_age_s is not None and self._clock() - self._keys.confirmed_s() > self._max_age_s:
            raise UnavailableError(
                "API keys cannot be checked: the gateway has not reached the API server for too long.",
                code="keys_stale",
                retry_after_s=RETRY_AFTER_S,
            )
