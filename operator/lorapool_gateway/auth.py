"""Who may call: API keys from labelled Secrets, as one frozen table that is swapped whole. Pure.

Called by watch (builds) and app (asks). Deny by default: a Secret that is not fully right gives no access.
Only sha256 sums are kept, and nothing of a key or a sum is ever logged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorapool_api.openai import Unauthenticated

FIELD_SHA256 = "keySha256"
FIELD_NAMESPACES = "namespaces"
FIELD_MAX_IN_FLIGHT = "maxInFlight"
ALL = "*"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_BUCKET_CHARS = 8


class BadKey(ValueError):
    """A Secret that carries the label but is no usable API key; the message says which field, not its value."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What the holder of one key may do. `namespaces` None: all."""

    id: str
    sha256: str = field(repr=False)
    namespaces: frozenset[str] | None
    max_in_flight: int | None = None

    def sees(self, namespace: str) -> bool:
        return self.namespaces is None or namespace in self.namespaces


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Buckets by the first digits of the sum, so that the comparison in constant time is short."""

    buckets: Mapping[str, tuple[ApiKey, ...]]

    @classmethod
    def of(cls, keys: Iterable[ApiKey]) -> KeyTable:
        """Of two Secrets with the same key the first by name counts."""
        buckets: dict[str, tuple[ApiKey, ...]] = {}
        for key in sorted(keys, key=lambda item: item.id):
            short = key.sha256[:_BUCKET_CHARS]
            buckets[short] = (*buckets.get(short, ()), key)
        return cls(buckets)

    def find(self, presented: str) -> ApiKey | None:
        digest = hashlib.sha256(presented.encode(errors="surrogateescape")).hexdigest()
        found: ApiKey | None = None
        for key in self.buckets.get(digest[:_BUCKET_CHARS], ()):
            if hmac.compare_digest(key.sha256, digest) and found is None:
                found = key
        return found


NO_KEYS = KeyTable({})


def authenticate(table: KeyTable, authorization: str | None) -> ApiKey:
    """The key behind an Authorization header. Raises Unauthenticated."""
    scheme, _, presented = (authorization or "").partition(" ")
    presented = presented.strip()
    if scheme.lower() != "bearer" or not presented:
        raise Unauthenticated("No API key given. Send it as `Authorization: Bearer <key>`.")
    key = table.find(presented)
    if key is None:
        raise Unauthenticated("The API key is not known or was revoked.")
    return key


def parse_key(secret: Mapping[str, Any]) -> ApiKey:
    """The API key that a Secret describes. Raises BadKey."""
    metadata = secret.get("metadata") or {}
    data = secret.get("data") or {}
    digest = _text(data, FIELD_SHA256).lower()
    if not _SHA256.fullmatch(digest):
        raise BadKey(f"{FIELD_SHA256} must be 64 hex digits")
    names = [name.strip() for name in _text(data, FIELD_NAMESPACES).split(",") if name.strip()]
    if not names:
        raise BadKey(f'{FIELD_NAMESPACES} must be a comma list of namespaces or "*"')
    if names != [ALL] and not all(_NAMESPACE.fullmatch(name) for name in names):
        raise BadKey(f"{FIELD_NAMESPACES} holds something that is no namespace name")
    limit: int | None = None
    if data.get(FIELD_MAX_IN_FLIGHT) is not None:
        text = _text(data, FIELD_MAX_IN_FLIGHT)
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise BadKey(f"{FIELD_MAX_IN_FLIGHT} must be a whole number above 0")
        limit = int(text)
    return ApiKey(
        id=str(metadata.get("name", "")),
        sha256=digest,
        namespaces=None if names == [ALL] else frozenset(names),
        max_in_flight=limit,
    )


def _text(data: Mapping[str, Any], name: str) -> str:
    try:
        return base64.b64decode(str(data[name]), validate=True).decode("ascii").strip()
    except KeyError:
        raise BadKey(f"{name} is missing") from None
    except (binascii.Error, UnicodeDecodeError):
        raise BadKey(f"{name} is not base64 of ASCII text") from None
