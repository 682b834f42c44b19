"""API keys from labelled Secrets, as one immutable table that is replaced whole. Pure.

Access is denied by default: a Secret with any invalid or unknown field grants none. Only sha256 sums are kept, and
neither a key nor a sum is ever logged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from lorapool_api.openai import UnauthenticatedError
from lorapool_api.quota_protocol import QUANTITY_MAX, Meter, parse_money
from lorapool_gateway.routing.objects import ObjectRef

FIELD_SHA256 = "keySha256"
FIELD_NAMESPACES = "namespaces"
FIELD_DEFAULT_NAMESPACE = "defaultNamespace"
FIELD_MAX_IN_FLIGHT = "maxInFlight"
FIELD_MODELS = "models"
FIELD_NOT_BEFORE = "notBefore"
FIELD_EXPIRES = "expires"
FIELD_OWNER = "owner"
FIELD_FINE_TUNING = "fineTuning"
FIELD_ADMIN = "admin"
FIELD_MONEY = "moneyPerMonth"
QUOTA_FIELDS = {
    "requestsPerMinute": Meter.REQUESTS_PER_MINUTE,
    "tokensPerMinute": Meter.TOKENS_PER_MINUTE,
    "tokensPerMonth": Meter.TOKENS_PER_MONTH,
}
FIELDS = frozenset(
    {
        FIELD_SHA256,
        FIELD_NAMESPACES,
        FIELD_DEFAULT_NAMESPACE,
        FIELD_MAX_IN_FLIGHT,
        FIELD_MODELS,
        FIELD_NOT_BEFORE,
        FIELD_EXPIRES,
        FIELD_OWNER,
        FIELD_FINE_TUNING,
        FIELD_ADMIN,
        FIELD_MONEY,
        *QUOTA_FIELDS,
    }
)
ALL = "*"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_MODEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_OWNER = re.compile(r"[ -~]{1,128}")
_BUCKET_CHARS = 8


class ApiKeyError(ValueError):
    """A Secret has the label but is no valid API key. The message names the field, never its value."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key and its permissions. `namespaces` None: all."""

    id: str
    """Name of its Secret."""
    sha256: str = field(repr=False)
    namespaces: frozenset[str] | None
    max_in_flight: int | None = None
    default_namespace: str | None = None
    """The namespace whose models a short name means first."""
    models: frozenset[str] | None = None
    """Full names of the only models that it may use; None: all of its namespaces."""
    not_before_unix_s: float = 0.0
    expires_unix_s: float = math.inf
    owner: str = ""
    """The person or team that the key was given to, for audits."""
    fine_tuning: bool = False
    """Whether it may use files and fine-tuning jobs, and delete the models that these make."""
    admin: bool = False
    """Whether it may read usage and costs: of its namespaces, or as the owner of all when `namespaces` is None."""
    uid: str = ""
    """Uid of its Secret: a Secret that is created again under the same name is another key. Where objects are files
    without uids, its name."""
    quotas: tuple[tuple[Meter, int], ...] = ()
    """Its rates and budgets."""
    currency: str = ""
    """Of its budget of money."""
    tenant: str = field(init=False)
    """Identifies the tenant to runtimes (`HEADER_TENANT`), the same for all keys of one owner: 16 hex digits."""

    def __post_init__(self) -> None:
        tenant = hashlib.sha256(f"lorapool-tenant/{self.owner or self.id}".encode()).hexdigest()[:16]
        object.__setattr__(self, "tenant", tenant)

    @property
    def visibility(self) -> Hashable:
        """Equal for keys that see the same models under the same names."""
        return self.namespaces, self.models, self.default_namespace

    def permits(self, model: ObjectRef) -> bool:
        """Whether the key may use this model, by its full name."""
        if self.namespaces is not None and model.namespace not in self.namespaces:
            return False
        return self.models is None or str(model) in self.models


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

    def __iter__(self) -> Iterator[ApiKey]:
        return (key for bucket in self.buckets.values() for key in bucket)

    def again(self, known: ApiKey) -> ApiKey | None:
        """The key as it is now; None if it was removed."""
        for key in self.buckets.get(known.sha256[:_BUCKET_CHARS], ()):
            if key.sha256 == known.sha256:
                return key
        return None


NO_KEYS = KeyTable({})


def check_again(table: KeyTable, known: ApiKey, now_unix_s: float) -> ApiKey:
    """The key of an earlier request as it is now. Raises UnauthenticatedError."""
    return _valid(table.again(known), now_unix_s)


def authenticate(table: KeyTable, authorization: str | None, now_unix_s: float) -> ApiKey:
    """The key that an Authorization header presents. Raises UnauthenticatedError."""
    scheme, _, presented = (authorization or "").partition(" ")
    presented = presented.strip()
    if scheme.lower() != "bearer" or not presented:
        raise UnauthenticatedError("No API key given. Send it as `Authorization: Bearer <key>`.")
    return _valid(table.find(presented), now_unix_s)


def _valid(key: ApiKey | None, now_unix_s: float) -> ApiKey:
    if key is None:
        raise UnauthenticatedError("The API key is not known or was revoked.")
    if now_unix_s < key.not_before_unix_s:
        raise UnauthenticatedError("The API key is not valid yet.")
    if now_unix_s >= key.expires_unix_s:
        raise UnauthenticatedError("The API key has expired.")
    return key


def parse_key(secret: Mapping[str, Any]) -> ApiKey:
    """Parses the API key from a Secret. Raises ApiKeyError."""
    metadata, data = secret.get("metadata") or {}, secret.get("data") or {}
    digest = _text(data, FIELD_SHA256).lower()
    if not _SHA256.fullmatch(digest):
        raise ApiKeyError(f"{FIELD_SHA256} must be 64 hex digits")
    if unknown := sorted(data.keys() - FIELDS):
        raise ApiKeyError(f"{unknown[0][:64]} is no field of an API key; the fields are {', '.join(sorted(FIELDS))}")
    namespaces = _namespaces(data)
    money, currency = _money(data)
    return ApiKey(
        id=str(metadata.get("name", "")),
        sha256=digest,
        namespaces=namespaces,
        max_in_flight=_max_in_flight(data),
        default_namespace=_default_namespace(data, namespaces),
        models=_models(data),
        not_before_unix_s=_time(data, FIELD_NOT_BEFORE, 0.0),
        expires_unix_s=_time(data, FIELD_EXPIRES, math.inf),
        owner=_owner(data),
        fine_tuning=_flag(data, FIELD_FINE_TUNING),
        admin=_flag(data, FIELD_ADMIN),
        quotas=_quotas(data) + money,
        currency=currency,
        uid=str(metadata.get("uid") or metadata.get("name", ""))[:64],
    )


def _namespaces(data: Mapping[str, Any]) -> frozenset[str] | None:
    names = _list(data, FIELD_NAMESPACES)
    if not names:
        raise ApiKeyError(f'{FIELD_NAMESPACES} must be a comma list of namespaces or "*"')
    if names != [ALL] and not all(_NAMESPACE.fullmatch(name) for name in names):
        raise ApiKeyError(f"{FIELD_NAMESPACES} contains an invalid namespace name")
    return None if names == [ALL] else frozenset(names)


def _default_namespace(data: Mapping[str, Any], namespaces: frozenset[str] | None) -> str | None:
    if data.get(FIELD_DEFAULT_NAMESPACE) is None:
        return None
    name = _text(data, FIELD_DEFAULT_NAMESPACE)
    if not _NAMESPACE.fullmatch(name) or (namespaces is not None and name not in namespaces):
        raise ApiKeyError(f"{FIELD_DEFAULT_NAMESPACE} must be one of the key's {FIELD_NAMESPACES}")
    return name


def _max_in_flight(data: Mapping[str, Any]) -> int | None:
    if data.get(FIELD_MAX_IN_FLIGHT) is None:
        return None
    text = _text(data, FIELD_MAX_IN_FLIGHT)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise ApiKeyError(f"{FIELD_MAX_IN_FLIGHT} must be a whole number above 0")
    return int(text)


def _models(data: Mapping[str, Any]) -> frozenset[str] | None:
    if data.get(FIELD_MODELS) is None:
        return None
    names = _list(data, FIELD_MODELS)
    if not names or not all(_MODEL.fullmatch(name) for name in names):
        raise ApiKeyError(f"{FIELD_MODELS} must be a comma list of full names, namespace/name")
    return frozenset(names)


def _time(data: Mapping[str, Any], name: str, default: float) -> float:
    if data.get(name) is None:
        return default
    text = _text(data, name)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ApiKeyError(f"{name} must be a time such as 2027-01-31T12:00:00Z") from None
    if found.tzinfo is None:
        raise ApiKeyError(f"{name} must name its time zone, as in 2027-01-31T12:00:00Z")
    return found.timestamp()


def _owner(data: Mapping[str, Any]) -> str:
    text = _text(data, FIELD_OWNER) if data.get(FIELD_OWNER) is not None else ""
    if text and not _OWNER.fullmatch(text):
        raise ApiKeyError(f"{FIELD_OWNER} must be 1 to 128 printable ASCII characters")
    return text


def _flag(data: Mapping[str, Any], name: str) -> bool:
    text = _text(data, name) if data.get(name) is not None else "false"
    if text not in ("true", "false"):
        raise ApiKeyError(f"{name} must be true or false")
    return text == "true"


def _quotas(data: Mapping[str, Any]) -> tuple[tuple[Meter, int], ...]:
    found = []
    for name, meter in QUOTA_FIELDS.items():
        if data.get(name) is not None:
            text = _text(data, name)
            if not re.fullmatch(r"[1-9][0-9]{0,15}", text) or int(text) >= QUANTITY_MAX:
                raise ApiKeyError(f"{name} must be a whole number from 1 to 2^53 - 1; leave it out for no limit")
            found.append((meter, int(text)))
    return tuple(found)


def _money(data: Mapping[str, Any]) -> tuple[tuple[tuple[Meter, int], ...], str]:
    if data.get(FIELD_MONEY) is None:
        return (), ""
    try:
        amount, currency = parse_money(_text(data, FIELD_MONEY))
    except ApiKeyError:
        raise
    except ValueError as error:
        raise ApiKeyError(f"{FIELD_MONEY} {error}") from None
    return ((Meter.MONEY_PER_MONTH, amount),), currency


def _list(data: Mapping[str, Any], name: str) -> list[str]:
    return [item.strip() for item in _text(data, name).split(",") if item.strip()]


def _text(data: Mapping[str, Any], name: str) -> str:
    try:
        return base64.b64decode(str(data[name]), validate=True).decode("ascii").strip()
    except KeyError:
        raise ApiKeyError(f"{name} is missing") from None
    except (binascii.Error, UnicodeDecodeError):
        raise ApiKeyError(f"{name} is not base64 of ASCII text") from None
