"""API keys from labelled Secrets, as one immutable table that is replaced whole. Pure.

Access is denied by default: a Secret with any invalid field grants none. Only sha256 sums are kept, and neither a key
nor a sum is ever logged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorapool_api.openai import UnauthenticatedError

FIELD_SHA256 = "keySha256"
FIELD_NAMESPACES = "namespaces"
FIELD_MAX_IN_FLIGHT = "maxInFlight"
ALL = "*"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_BUCKET_CHARS = 8


class ApiKeyError(ValueError):
    """A Secret has the label but is no valid API key. The message names the field, never its value."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key and its permissions. `namespaces` None: all."""

    id: str
    sha256: str = field(repr=False)
    namespaces: frozenset[str] | None
    max_in_flight: int | None = None

    @property
    def tenant(self) -> str:
        """Identifies the tenant to runtimes (`HEADER_TENANT`): 16 hex digits that depend on the key's name only."""
        return hashlib.sha256(f"lorapool-tenant/{self.id}".encode()).hexdigest()[:16]

    @property
    def visibility(self) -> Hashable:
        """Equal for keys that see the same models under the same names."""
        return self.namespaces

    def sees(self, namespace: str) -> bool:
        """Whether the key may use models of this namespace."""
        return self.namespaces is None or namespace in self.namespaces


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Keys in buckets by the first digits of their sum, so that few are compared in constant time."""

    buckets: Mapping[str, tuple[ApiKey, ...]]

    @classmethod
    def of(cls, keys: Iterable[ApiKey]) -> KeyTable:
        """Builds the table. Of two Secrets with the same key, the first by name is used."""
        buckets: dict[str, tuple[ApiKey, ...]] = {}
        for key in sorted(keys, key=lambda item: item.id):
            short = key.sha256[:_BUCKET_CHARS]
            buckets[short] = (*buckets.get(short, ()), key)
        return cls(buckets)

    def find(self, presented: str) -> ApiKey | None:
        """The key with this text; None if there is none."""
        digest = hashlib.sha256(presented.encode(errors="surrogateescape")).hexdigest()
        found: ApiKey | None = None
        for key in self.buckets.get(digest[:_BUCKET_CHARS], ()):
            if hmac.compare_digest(key.sha256, digest) and found is None:
                found = key
        return found


NO_KEYS = KeyTable({})


def authenticate(table: KeyTable, authorization: str | None) -> ApiKey:
    """The key that an Authorization header presents. Raises UnauthenticatedError."""
    scheme, _, presented = (authorization or "").partition(" ")
    presented = presented.strip()
    if scheme.lower() != "bearer" or not presented:
        raise UnauthenticatedError("No API key given. Send it as `Authorization: Bearer <key>`.")
    key = table.find(presented)
    if key is None:
        raise UnauthenticatedError("The API key is not known or was revoked.")
    return key


def parse_key(secret: Mapping[str, Any]) -> ApiKey:
    """Parses the API key from a Secret. Raises ApiKeyError."""
    metadata = secret.get("metadata") or {}
    data = secret.get("data") or {}
    digest = _text(data, FIELD_SHA256).lower()
    if not _SHA256.fullmatch(digest):
        raise ApiKeyError(f"{FIELD_SHA256} must be 64 hex digits")
    names = [name.strip() for name in _text(data, FIELD_NAMESPACES).split(",") if name.strip()]
    if not names:
        raise ApiKeyError(f'{FIELD_NAMESPACES} must be a comma list of namespaces or "*"')
    if names != [ALL] and not all(_NAMESPACE.fullmatch(name) for name in names):
        raise ApiKeyError(f"{FIELD_NAMESPACES} contains an invalid namespace name")
    limit: int | None = None
    if data.get(FIELD_MAX_IN_FLIGHT) is not None:
        text = _text(data, FIELD_MAX_IN_FLIGHT)
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise ApiKeyError(f"{FIELD_MAX_IN_FLIGHT} must be a whole number above 0")
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
        raise ApiKeyError(f"{name} is missing") from None
    except (binascii.Error, UnicodeDecodeError):
        raise ApiKeyError(f"{name} is not base64 of ASCII text") from None
