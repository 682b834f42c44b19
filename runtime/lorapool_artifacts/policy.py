"""With whose rights the sources of a namespace are read, and which sources it may name. Pure, but for `read_*`.

Operator and runtime decide by these rules alone. The administrator's `SourcePolicy` has an entry per namespace; the
owner of a base may let a guest, which is a namespace that uses the base of another one, read sources with its rights.

    no entry: the base's own namespace   -> any source, with the shared credentials and the base's volumes
              a guest                    -> any source but a volume, with its own credentials or none
    an entry                             -> the sources below its prefixes, with the credentials that it names
    a store:// source, with either       -> the namespace's own objects, with a token that the operator makes for it
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from lorapool_api.basemodel import SOURCE_PREFIX_PATTERN, Access
from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.uri import ArtifactUri, HfUri, OciUri, PvcUri, S3Uri, StoreUri, parse_uri

EVERY_NAMESPACE = "*"
"""The key of the entry for the namespaces that have none."""
DEFAULT_SECRET = "lorapool-source-credentials"

_Parts = tuple[str, ...]

_UNLISTED = "which none of its prefixes in the chart's artifacts.policy covers; ask the administrator to add one."
_FOREIGN_STORE = "objects of the store are read by their own namespace alone; use one below store://{}/."
_FOREIGN_VOLUME = "a volume of the base's owner; ask the owner for an entry in spec.access.sources of the BaseModel."


class Rights(StrEnum):
    """Whose credentials a source is read with."""

    SHARED = "Shared"
    """The administrator's, which the operator and the base's runtimes have."""
    OWN = "Own"
    """Those of the Secret in the namespace itself, or none."""


class PolicyError(Exception):
    """The policy cannot be read; the message names the file and the field."""


@functools.lru_cache(maxsize=4096)
def prefix_parts(text: str) -> _Parts:
    """The scheme and the path of a prefix, part by part. Raises ValueError."""
    scheme, _, rest = text.partition("://")
    parts = rest.removesuffix("/").split("/") if rest else []
    named = parts[1:] if scheme == "oci" else parts  # a registry's host may have a port
    if not re.fullmatch(SOURCE_PREFIX_PATTERN, text) or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{text[:80]!r} is not a prefix; write one like s3://bucket/folder/ or hf://organisation/")
    if any(":" in part for part in named):
        raise ValueError(f"{text[:80]!r}: a prefix names a repository or folder, not a tag")
    if scheme == "oci" and parts:
        parts[0] = parts[0].lower()
    return (scheme, *parts)


def covers(prefixes: Iterable[str], uri: ArtifactUri) -> bool:
    """Whether a URI is below one of the prefixes, whatever its revision. Whole parts are compared: s3://a/b is not a
    prefix of s3://a/bc. A prefix that is malformed covers nothing."""
    parts = _parts_of(uri)
    return any(parts[: len(prefix)] == prefix for prefix in map(_parts_or_none, prefixes) if prefix is not None)


def _parts_or_none(prefix: str) -> _Parts | None:
    try:
        return prefix_parts(prefix)
    except ValueError:
        return None


def _parts_of(uri: ArtifactUri) -> _Parts:
    match uri:
        case HfUri(repo=repo, path=path):
            return ("hf", *repo.split("/"), *_split(path))
        case OciUri(host=host, repo=repo):
            return ("oci", host, *repo.split("/"))
        case S3Uri(bucket=root, prefix=path):
            return ("s3", root, *_split(path))
        case PvcUri(claim=root, path=path):
            return ("pvc", root, *_split(path))
        case StoreUri(namespace=root, key=path):
            return ("store", root, *_split(path))


def _split(path: str) -> _Parts:
    return tuple(path.split("/")) if path else ()


def _is_prefix(text: str) -> str:
    prefix_parts(text)
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )


class NamespaceRules(_Strict):
    """What the objects of one namespace may use as sources."""

    prefixes: tuple[Annotated[str, AfterValidator(_is_prefix)], ...] | None = None
    """Only sources below these, such as s3://models/team-b/. Volumes (pvc://) of other namespaces' bases must be listed
    here. Absent: any source, but no such volume."""
    credentials: Rights | None = None
    """Shared: the release's credentials and the volumes of the base. Own: those of `credentialsSecret`. Default: Shared
    for the namespace of the base, Own for others."""
    credentials_secret: str = Field(default="", max_length=253)
    """Name of the Secret, in this namespace and with the label lorapool.dev/source-credentials=true, that has its own
    credentials. Default: the chart's artifacts.namespaceCredentials."""


class SourcePolicy(_Strict):
    """The administrator's rules by namespace."""

    namespaces: dict[str, NamespaceRules] = Field(default_factory=dict)
    """By name; `*` stands for all namespaces without an entry."""

    def of(self, namespace: str) -> NamespaceRules | None:
        """The entry for a namespace, if any."""
        return self.namespaces.get(namespace) or self.namespaces.get(EVERY_NAMESPACE)

    def secret_of(self, namespace: str, default: str) -> str:
        """The name of the Secret with a namespace's own credentials; empty for none."""
        entry = self.of(namespace)
        return (entry.credentials_secret if entry is not None else "") or default


@dataclass(frozen=True, slots=True)
class Permission:
    """Whether a namespace may use a source, and with whose rights it is then read."""

    rights: Rights = Rights.SHARED
    refused: str = ""
    """Why it may not, and what to do; empty if it may."""


class SourceRules(_Strict):
    """Everything that decides on the sources of one base: the operator writes it to a file of the base's runtimes."""

    owner: str
    """The namespace of the base."""
    policy: SourcePolicy = Field(default_factory=SourcePolicy)
    grants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By guest: prefixes of what it may read with the owner's rights (`spec.access.sources` of the base)."""

    @classmethod
    def of(cls, owner: str, access: Access, policy: SourcePolicy) -> SourceRules:
        """The rules for one base, with the entries that concern it."""
        users = {owner, EVERY_NAMESPACE, *access.namespaces}
        entries = {name: entry for name, entry in policy.namespaces.items() if name in users}
        grants: dict[str, tuple[str, ...]] = {}
        for grant in access.sources:
            grants[grant.namespace] = (*grants.get(grant.namespace, ()), *grant.prefixes)
        return cls(owner=owner, policy=SourcePolicy(namespaces=entries), grants=grants)

    def permission(self, namespace: str, uri: str) -> Permission:
        """Whether the objects of a namespace may use this source. Malformed URIs fail when they are read."""
        try:
            return self._permission(namespace, parse_uri(uri))
        except ValueError:
            return Permission(Rights.OWN)

    def uses_own_credentials(self, namespace: str) -> bool:
        """Whether sources of a namespace are read with its own credentials, except those that the owner grants."""
        return not self._shares(namespace, self.policy.of(namespace))

    def check(self, namespace: str, uri: str) -> Rights:
        """The rights with which a source is read. Raises ArtifactError (SourceNotPermitted)."""
        found = self.permission(namespace, uri)
        if found.refused:
            raise ArtifactError(FailureReason.SOURCE_NOT_PERMITTED, found.refused)
        return found.rights

    def boundary(self, namespace: str, uri: str) -> str:
        """The folder of a volume that links in a source must not leave: that of the shortest prefix that admits the
        source. Empty: the whole volume."""
        entry, parsed = self.policy.of(namespace), parse_uri(uri)
        if entry is not None and entry.prefixes is not None:
            prefixes = entry.prefixes
        elif self._shares(namespace, entry):
            return ""
        else:
            prefixes = self.grants.get(namespace, ())
        folders = ("/".join(prefix_parts(prefix)[2:]) for prefix in prefixes if covers([prefix], parsed))
        return min(folders, key=len, default="")

    def _permission(self, namespace: str, uri: ArtifactUri) -> Permission:
        if isinstance(uri, StoreUri) and uri.namespace != namespace:
            return Permission(refused=f"Namespace {namespace} may not use {uri}: {_FOREIGN_STORE.format(namespace)}")
        entry = self.policy.of(namespace)
        listed = entry is not None and entry.prefixes is not None and covers(entry.prefixes, uri)
        if entry is not None and entry.prefixes is not None and not listed:
            return Permission(refused=f"Namespace {namespace} may not use {uri}, {_UNLISTED}")
        if isinstance(uri, StoreUri):
            return Permission(Rights.OWN)
        if self._shares(namespace, entry) or self._granted(namespace, uri):
            return Permission(Rights.SHARED)
        if not isinstance(uri, PvcUri):
            return Permission(Rights.OWN)
        if namespace != self.owner and not listed:
            return Permission(refused=f"Namespace {namespace} may not use {uri}, {_FOREIGN_VOLUME}")
        return Permission(Rights.SHARED)

    def _shares(self, namespace: str, entry: NamespaceRules | None) -> bool:
        if entry is not None and entry.credentials is not None:
            return entry.credentials is Rights.SHARED
        return namespace == self.owner

    def _granted(self, namespace: str, uri: ArtifactUri) -> bool:
        """Whether the owner grants this source to a guest, and may itself read it with the shared rights."""
        if namespace == self.owner or not covers(self.grants.get(namespace, ()), uri):
            return False
        return self._permission(self.owner, uri) == Permission(Rights.SHARED)


def parse_policy(text: str, *, origin: str) -> SourcePolicy:
    """Parses the administrator's policy. Raises PolicyError that names `origin` and the field."""
    try:
        return SourcePolicy.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise PolicyError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise PolicyError(f"{origin}: {problems}") from error


def read_policy(path: Path | None) -> SourcePolicy:
    """Reads the policy; an empty one without a file. Raises PolicyError."""
    if path is None:
        return SourcePolicy()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}") from error
    return parse_policy(text, origin=str(path))
