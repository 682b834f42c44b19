"""The store's HTTP protocol: routes, the names of objects, and the tokens that say which of them a caller may use.

A token is a grant that is signed with the master token of the store, so that the store keeps no list of them. Processes
that have the master token make tokens for others: the operator one for each job, the gateway one for itself.

    token   lps1.<base64url of the grant as JSON>.<HMAC-SHA256 in hex>
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

from pydantic import ConfigDict, Field, ValidationError

from lorapool_api.common import ApiModel
from lorapool_api.pod_address import server_name

STORE_PORT: Final = 8000
STORE_SERVER_NAME: Final = server_name("store")
"""The name in the certificate of the store."""

ROUTE_OBJECTS: Final = "/v1/objects/"
"""`<namespace>/<key>`: PUT, GET, HEAD, DELETE. A key that ends in a slash stands for all objects below it: GET lists
them, DELETE deletes them."""
ROUTE_USAGE: Final = "/v1/usage/"
"""`<namespace>`: GET."""
HEADER_EXPIRES: Final = "X-Lorapool-Expires"
"""Of a PUT: Unix time in seconds at which the object is deleted."""

CODE_OBJECT_NOT_FOUND: Final = "object_not_found"
CODE_OBJECT_EXISTS: Final = "object_exists"
CODE_QUOTA_EXCEEDED: Final = "quota_exceeded"
CODE_NOT_PERMITTED: Final = "not_permitted"

MAX_KEY_CHARS: Final = 512
MAX_LIST: Final = 1000

_PREFIX: Final = "lps1"
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class StoreGrant(ApiModel):
    """What the bearer of a token may do. A prefix is `<namespace>/<key>`; one that ends in a slash covers all below
    it, any other one exactly this object, and the empty one everything."""

    model_config = ConfigDict(frozen=True)

    read: tuple[str, ...] = ()
    """Prefixes of what may be read and listed."""
    write: tuple[str, ...] = ()
    """Prefixes of what may be written and deleted too."""
    expires_unix_s: int | None = None
    """The token is refused from then on."""

    def permits(self, name: str, *, write: bool) -> bool:
        """Whether the object, or everything below a name that ends in a slash, may be used."""
        prefixes = self.write if write else (*self.read, *self.write)
        return any(_covers(prefix, name) for prefix in prefixes)


class StoreAccess(ApiModel):
    """Everything that a process needs to use the store for one purpose."""

    url: str
    """Without a path."""
    token: str = Field(repr=False)
    """Bearer token."""
    ca: str = ""
    """The authorities (PEM) that sign the store's certificate. Empty: as for plain HTTP."""


class StoredObject(ApiModel):
    """One object of a listing, and the response of a PUT."""

    key: str
    """Without the namespace."""
    size: int
    """Bytes."""
    etag: str
    """Changes with the content."""
    modified_unix_s: float = 0.0
    """When it was written."""
    sha256: str | None = None
    """Hex digits; only in the response of a PUT."""


class StoreListing(ApiModel):
    """Response of a GET of a key that ends in a slash."""

    objects: list[StoredObject]
    """Sorted by key."""
    has_more: bool
    """Whether more follow; ask for those `after` the last key."""


class StoreUsage(ApiModel):
    """Response of `GET /v1/usage/<namespace>`."""

    bytes: int
    """Size of all objects together."""
    quota_bytes: int
    """What they may have."""


def is_key(text: str) -> bool:
    """Whether `text` is a name for an object in a namespace: parts of letters, digits and `._-` that begin with no
    dot, joined by slashes."""
    return 0 < len(text) <= MAX_KEY_CHARS and all(_PART.fullmatch(part) for part in text.split("/"))


def is_namespace(text: str) -> bool:
    """Whether `text` can be the name of a Kubernetes namespace."""
    return _NAMESPACE.fullmatch(text) is not None


def object_path(namespace: str, key: str) -> str:
    """The path of an object's URL."""
    return ROUTE_OBJECTS + quote(f"{namespace}/{key}")


def mint(master: str, grant: StoreGrant) -> str:
    """Returns a token for this grant."""
    payload = base64.urlsafe_b64encode(grant.model_dump_json(by_alias=True, exclude_none=True).encode()).decode()
    return f"{_PREFIX}.{payload}.{_mac(master, payload)}"


def grant_of(masters: Iterable[str], token: str, now_unix_s: float) -> StoreGrant | None:
    """The grant of a token; None if no master token signed it or it has expired."""
    prefix, _, rest = token.partition(".")
    payload, _, mac = rest.partition(".")
    given = mac.encode(errors="replace")
    signed = [hmac.compare_digest(_mac(master, payload).encode(), given) for master in masters]
    if prefix != _PREFIX or not any(signed):
        return None
    try:
        grant = StoreGrant.model_validate_json(base64.urlsafe_b64decode(payload))
    except (binascii.Error, ValidationError, ValueError):
        return None
    return None if grant.expires_unix_s is not None and now_unix_s >= grant.expires_unix_s else grant


def _covers(prefix: str, name: str) -> bool:
    return prefix in ("", name) or (prefix.endswith("/") and name.startswith(prefix))


def _mac(master: str, payload: str) -> str:
    return hmac.new(master.encode(), f"lorapool-store/{payload}".encode(errors="replace"), hashlib.sha256).hexdigest()
