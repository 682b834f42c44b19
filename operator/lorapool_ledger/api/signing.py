"""Signed values that callers keep for the ledger: page cursors and sessions. They can be read, but not made or edited.

The key is derived from the ledger's own token, so all replicas accept each other's values. While that token is rotated,
values that the previous one signed stay valid.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from typing import Any

MAX_CHARS = 2048


class Signer:
    def __init__(self, purpose: str, tokens: Callable[[], Sequence[str]]) -> None:
        """`tokens()` are the ledger's own tokens, the current one first. Values of another purpose are not accepted."""
        self._purpose = purpose
        self._tokens = tokens

    def sign(self, value: dict[str, Any], *, bound_to: str = "") -> str:
        """A text for a URL or a cookie. Only a caller of `read` with the same `bound_to` can use it."""
        body = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
        return f"{_encoded(body)}.{_encoded(self._mac(self._tokens()[0], body, bound_to))}"

    def read(self, text: str, *, bound_to: str = "") -> dict[str, Any] | None:
        """The signed value; None if the text is foreign, edited or bound to something else."""
        head, _, tail = text.partition(".")
        try:
            body, mac = _decoded(head), _decoded(tail)
        except (ValueError, binascii.Error):
            return None
        if len(text) > MAX_CHARS or not any(
            hmac.compare_digest(mac, self._mac(token, body, bound_to)) for token in self._tokens()
        ):
            return None
        value: dict[str, Any] = json.loads(body)
        return value

    def peek(self, text: str) -> dict[str, Any]:
        """The value without a check of its signature, to find what it is bound to; empty if there is none."""
        try:
            value = json.loads(_decoded(text.partition(".")[0][:MAX_CHARS]))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _mac(self, token: str, body: bytes, bound_to: str) -> bytes:
        key = hmac.digest(token.encode(), f"lorapool-ledger/{self._purpose}".encode(), hashlib.sha256)
        return hmac.digest(key, bound_to.encode() + b"\0" + body, hashlib.sha256)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    """Raises ValueError, also for other spellings of the same bytes."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encoded(data) != text:
        raise ValueError
    return data
