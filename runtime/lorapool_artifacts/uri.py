"""Parses source URIs strictly, without resolving them.

`hf://org/name[/folder][@rev]`, `oci://host[:port]/repo[:tag|@sha256:…][/folder]`, `s3://bucket/prefix`,
`pvc://claim/path` and `store://namespace/key`. Other schemes, user names, queries, fragments and dot segments are
refused, and so are characters that a client library might interpret differently. Pure.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lorapool_api.store_protocol import is_key, is_namespace

MAX_URI_CHARS = 512

_HF_PART = re.compile(r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?$")
_HF_REVISION = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$")
_OCI_HOST = re.compile(r"^(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?$")
_OCI_REPO_PART = re.compile(r"^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$")
_OCI_TAG = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")
_OCI_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
_S3_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_PATH_PART = re.compile(r"^[A-Za-z0-9_=+,()!'*-][A-Za-z0-9_=+,()!'*. -]*$")
_PVC_CLAIM = re.compile(r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*$")


@dataclass(frozen=True, slots=True)
class HfUri:
    """A model repository of the hub at `HF_ENDPOINT`, or a folder of it."""

    repo: str
    revision: str | None = None
    path: str = ""
    """Folder in the repository, without dot segments; may be empty."""

    @property
    def folder(self) -> str:
        """The URI without its revision."""
        return "/".join(filter(None, (f"hf://{self.repo}", self.path)))

    def __str__(self) -> str:
        return self.folder + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class OciUri:
    """An artifact of an OCI registry, whose layers are the files, or a folder of it. `digest` wins over `tag`."""

    host: str
    """With the port, if any."""
    repo: str
    tag: str | None = None
    digest: str | None = None
    path: str = ""
    """Folder in the titles of the layers, without dot segments; may be empty."""

    @property
    def reference(self) -> str:
        """The digest, else the tag, else `latest`."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"oci://{self.host}/{self.repo}{tag}{digest}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True, slots=True)
class S3Uri:
    """A folder of a bucket. `prefix` has no slash at either end and may be empty."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class PvcUri:
    """A folder of a volume, which only a runtime that mounts it can read."""

    claim: str
    path: str
    """Relative path without dot segments; may be empty."""

    def __str__(self) -> str:
        return f"pvc://{self.claim}/{self.path}"


@dataclass(frozen=True, slots=True)
class StoreUri:
    """A folder of the release's store. `key` has no slash at either end and may be empty."""

    namespace: str
    key: str

    def __str__(self) -> str:
        return f"store://{self.namespace}/{self.key}"


ArtifactUri: TypeAlias = HfUri | OciUri | S3Uri | PvcUri | StoreUri


def parse_uri(text: str) -> ArtifactUri:
    """Parses a source URI. Raises ValueError, whose message shows the expected form."""
    if len(text) > MAX_URI_CHARS:
        raise ValueError(f"source URI is longer than {MAX_URI_CHARS} characters")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _PARSERS:
        raise ValueError(
            f"unknown source {text[:80]!r}: write hf://org/name, oci://host/repo:tag, s3://bucket/prefix, "
            f"pvc://claim/path or store://namespace/key{_perhaps(text)}"
        )
    if bad := re.search(r"[\x00-\x1f\x7f\\?#%]|[^\x00-\x7f]", rest):
        raise ValueError(f"source URI {text[:80]!r} contains {bad[0]!r}, which is not allowed in a source")
    return _PARSERS[scheme](rest)


def _perhaps(text: str) -> str:
    """What a person meant who wrote a page of the hub or a repository's name alone; empty if that is unclear."""
    name, _, path = text.removeprefix("https://huggingface.co/").partition("/tree/")
    folder = path.partition("/")[2].strip("/")
    try:
        meant = _parse_hf("/".join(filter(None, (name.rstrip("/"), folder))))
    except ValueError:
        return ""
    return f"; perhaps you mean {meant}"


def _parse_hf(rest: str) -> HfUri:
    name, at, revision = rest.partition("@")
    organisation, _, tail = name.partition("/")
    repo, _, path = tail.partition("/")
    if not all(_HF_PART.match(part) and ".." not in part and "--" not in part for part in (organisation, repo)):
        raise ValueError(f"hf://{rest[:80]}: write hf://organisation/name[/folder] or hf://organisation/name@revision")
    if at and not is_revision(revision):
        raise ValueError(f"hf://{rest[:80]}: {revision[:40]!r} is not a branch, tag or commit")
    return HfUri(f"{organisation}/{repo}", revision or None, _path(path, f"hf://{rest[:80]}"))


def is_revision(text: str) -> bool:
    """Whether `text` can name a branch, a tag, a commit or a digest."""
    parts = text.split("/")
    return bool(_OCI_DIGEST.match(text) or _HF_REVISION.match(text)) and all(part.strip(".") for part in parts)


def _parse_oci(rest: str) -> OciUri:
    host, _, name = rest.partition("/")
    if not _OCI_HOST.match(host) or ".." in host or not _is_bracketed_ipv6(host):
        raise ValueError(
            f"oci://{rest[:80]}: {host[:60]!r} is not a registry host; write oci://host[:port]/repository:tag"
        )
    named, at, digest = name.partition("@")
    repo, colon, tag = named.partition(":")
    digest, _, path = digest.partition("/")
    if not at:
        tag, _, path = tag.partition("/")
    if not repo or not all(_OCI_REPO_PART.match(part) for part in repo.split("/")):
        raise ValueError(
            f"oci://{rest[:80]}: {repo[:60]!r} is not a repository name (lower case letters, digits and . _ - /)"
        )
    if colon and not _OCI_TAG.match(tag):
        raise ValueError(f"oci://{rest[:80]}: {tag[:40]!r} is not a tag")
    if at and not _OCI_DIGEST.match(digest):
        raise ValueError(f"oci://{rest[:80]}: '@' must be followed by sha256: and 64 hex digits")
    port = host.rpartition("]")[2].partition(":")[2]
    if port and not 0 < int(port) < 65536:
        raise ValueError(f"oci://{rest[:80]}: port {port} is out of range")
    return OciUri(host.lower(), repo, tag or None, digest or None, _path(path, f"oci://{rest[:80]}"))


def _is_bracketed_ipv6(host: str) -> bool:
    """Whether what stands in brackets, if anything does, is an IPv6 address."""
    if not host.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(host[1:].partition("]")[0])
    except ValueError:
        return False
    return True


def _parse_s3(rest: str) -> S3Uri:
    bucket, _, prefix = rest.partition("/")
    if not _S3_BUCKET.match(bucket) or ".." in bucket:
        raise ValueError(f"s3://{rest[:80]}: {bucket[:70]!r} is not a bucket name; write s3://bucket/prefix")
    return S3Uri(bucket, _path(prefix, f"s3://{rest[:80]}"))


def _parse_pvc(rest: str) -> PvcUri:
    claim, _, path = rest.partition("/")
    if len(claim) > 253 or not _PVC_CLAIM.match(claim):
        raise ValueError(f"pvc://{rest[:80]}: {claim[:70]!r} is not a claim name; write pvc://claim/path/in/the/volume")
    return PvcUri(claim, _path(path, f"pvc://{rest[:80]}"))


def _parse_store(rest: str) -> StoreUri:
    namespace, _, key = rest.partition("/")
    key = key.rstrip("/")
    if not is_namespace(namespace) or (key and not is_key(key)):
        raise ValueError(f"store://{rest[:80]}: write store://namespace/key, with letters, digits and ._- in each part")
    return StoreUri(namespace, key)


def _path(text: str, uri: str) -> str:
    text = text.rstrip("/")
    if text and not all(_PATH_PART.match(part) or re.match(r"^\.[A-Za-z0-9_-]+$", part) for part in text.split("/")):
        raise ValueError(f"{uri}: the path contains an empty, '.' or '..' segment or a character that is not allowed")
    return text


_PARSERS: Mapping[str, Callable[[str], ArtifactUri]] = {
    "hf": _parse_hf,
    "oci": _parse_oci,
    "s3": _parse_s3,
    "pvc": _parse_pvc,
    "store": _parse_store,
}
