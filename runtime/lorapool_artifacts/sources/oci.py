"""`oci://host/repository[:tag|@sha256:…][/folder]`: an artifact whose layers are the files.

oras implements the authentication of registries and finds Docker's credentials. Requests go through our own session,
which is bounded and does not use oras' retries (minutes of sleep). A layer's title annotation is the file name, its
digest is the file's hash, and the manifest's digest is the revision. Archives are never unpacked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import oras.container
import oras.provider
import requests

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile
from lorapool_artifacts.settings import MIB, SourceSettings
from lorapool_artifacts.sources.address_guard import AddressGuard
from lorapool_artifacts.sources.base import files_below
from lorapool_artifacts.sources.http import (
    GuardedSession,
    error_of_status,
    iter_body,
    range_header,
    read_bounded,
    translated,
)
from lorapool_artifacts.uri import OciUri

MAX_MANIFEST_BYTES = 4 * MIB
TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
ACCESS = (
    "give the registry's credentials in a Docker config.json (DOCKER_CONFIG) or in LORAPOOL_OCI_AUTH_HOST, "
    "LORAPOOL_OCI_USERNAME and LORAPOOL_OCI_PASSWORD"
)
_DIGEST = re.compile(r"^sha256:([0-9a-f]{64})$")
_DOCKER_HUB = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}


class OciSource:
    """An artifact at one manifest."""

    def __init__(
        self, uri: OciUri, registry: _Registry, revision: str, layers: Mapping[str, tuple[RemoteFile, str]]
    ) -> None:
        self.where = str(uri)
        self.revision = revision
        self._registry = registry
        self._layers = layers
        self._prefix = f"{uri.path}/" if uri.path else ""

    def list_files(self) -> Sequence[RemoteFile]:
        return files_below(self._prefix, [file for file, _ in self._layers.values()])

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        _, digest = self._layers[self._prefix + name]
        response = self._registry.get(f"blobs/{digest}", range_header(start, length))
        if response.status_code not in (200, 206):
            response.close()
            raise error_of_status(response.status_code, response.headers, where=self.where, what=name, access=ACCESS)
        yield from iter_body(
            response, self._registry.deadline, skip=start if response.status_code == 200 else 0, length=length
        )

    def close(self) -> None:
        self._registry.session.close()


class _Registry(oras.provider.Registry):  # type: ignore[misc]  # oras carries no types
    """oras' client of one repository, on top of our session."""

    def __init__(self, uri: OciUri, settings: SourceSettings, deadline: Deadline) -> None:
        host = _DOCKER_HUB.get(uri.host, uri.host)
        guard = AddressGuard.of(settings, deadline.where)
        super().__init__(hostname=host, insecure=guard.permits_plain(*_name_and_port(host)), auth_backend="token")
        self.deadline = deadline
        self.session = GuardedSession(guard, deadline)
        self.auth.session = self.session
        self._url = f"{self.prefix}://{host}/v2/{uri.repo}/"
        if settings.oci_auth_host in (uri.host, host) and settings.oci_username and settings.oci_password:
            self.auth.set_basic_auth(settings.oci_username, settings.oci_password)
        elif settings.ambient:
            container = oras.container.Container(uri.repo, registry=uri.host)
            container.registry = uri.host
            config = settings.docker_config and settings.docker_config / "config.json"
            self.auth.load_configs(container, configs=[str(config)] if config and config.is_file() else None)

    def get(self, path: str, headers: Mapping[str, str]) -> requests.Response:
        """One GET, repeated with credentials when the registry sends a challenge. Raises ArtifactError."""
        sent = dict(headers)
        if self.auth.token is not None:
            sent.update(self.auth.get_auth_header())
        with translated(self.deadline):
            response = self.session.get(self._url + path, headers=sent, stream=True)
            if response.status_code != 401:
                return response
            with response:
                granted = self._authorized(response, dict(headers))
            if granted is None:
                return response
            return self.session.get(self._url + path, headers=granted, stream=True)

    def _authorized(self, response: requests.Response, headers: dict[str, str]) -> dict[str, str] | None:
        challenge = response.headers.get("Www-Authenticate", "")
        basic: str | None = getattr(self.auth, "_basic_auth", None)
        if challenge[:5].lower() == "basic":
            return {**headers, "Authorization": f"Basic {basic}"} if basic else None
        if not re.search(r'realm="https?://', challenge):
            return None
        try:
            granted, changed = self.auth.authenticate_request(response, headers, refresh=True)
        except requests.exceptions.JSONDecodeError:
            return None
        return dict(granted) if changed else None


def open_oci(uri: OciUri, revision: str | None, settings: SourceSettings, deadline: Deadline) -> OciSource:
    """Fetches the manifest of `revision`, a digest or a tag. Raises ArtifactError."""
    reference = revision or uri.reference
    registry = _Registry(uri, settings, deadline)
    try:
        digest, raw = _manifest(registry, str(uri), reference)
        return OciSource(uri, registry, digest, parse_manifest(raw, where=str(uri)))
    except BaseException:
        registry.session.close()
        raise


def _manifest(registry: _Registry, where: str, reference: str) -> tuple[str, bytes]:
    """The digest and the content of a manifest. Raises ArtifactError."""
    response = registry.get(f"manifests/{reference}", {"Accept": ", ".join(MANIFEST_TYPES + INDEX_TYPES)})
    if response.status_code != 200:
        response.close()
        what = f"the artifact {reference}"
        raise error_of_status(response.status_code, response.headers, where=where, what=what, access=ACCESS)
    raw = read_bounded(response, registry.deadline, MAX_MANIFEST_BYTES, "the manifest")
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    if _DIGEST.match(reference) and digest != reference:
        raise ArtifactError(FailureReason.DIGEST_MISMATCH, f"{where}: the registry sent another manifest, {digest}.")
    return digest, raw


def parse_manifest(raw: bytes, *, where: str) -> dict[str, tuple[RemoteFile, str]]:
    """The files of a manifest: file name → (file, blob digest). Raises ArtifactError."""
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _malformed(where) from error
    if not isinstance(manifest, dict):
        raise _malformed(where)
    if manifest.get("mediaType") in INDEX_TYPES or "manifests" in manifest:
        raise ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"{where} is an image index; push the files as one artifact (oras push host/repository:tag "
            "adapter_config.json ...).",
        )
    layers = manifest.get("layers")
    if not isinstance(layers, list) or len(layers) > 10_000:
        raise _malformed(where)
    files = [_layer(layer, where) for layer in layers]
    result = {file.name: (file, digest) for file, digest in files}
    if len(result) != len(files):
        raise ArtifactError(FailureReason.CORRUPT_ARTIFACT, f"{where}: two layers have one title; push each file once.")
    return result


def _layer(layer: Any, where: str) -> tuple[RemoteFile, str]:
    if not isinstance(layer, dict):
        raise _malformed(where)
    digest, size, media_type = layer.get("digest"), layer.get("size"), layer.get("mediaType")
    match = _DIGEST.match(digest) if isinstance(digest, str) else None
    if match is None or type(size) is not int or size < 0:
        raise _malformed(where)
    return RemoteFile(_name(layer.get("annotations"), media_type, match[1]), size, match[1]), match[0]


def _name(annotations: Any, media_type: Any, sha256: str) -> str:
    """The file name of a layer: its title, with an archive's ending when the layer is packed.

    oras gives plain files the media type of a tar, so only compression or its unpack annotation mark an archive.
    """
    notes = annotations if isinstance(annotations, dict) else {}
    kinds = re.split(r"[.+]", media_type) if isinstance(media_type, str) else []
    title = notes.get(TITLE)
    if not isinstance(title, str) or not title:
        return f"{sha256}.tar" if "tar" in kinds else sha256
    packed = "gzip" in kinds or "zstd" in kinds or notes.get(UNPACK) == "true"
    return f"{title}.tar.gz" if packed else title


def _name_and_port(host: str) -> tuple[str, int]:
    """A registry's host name and port: 80 without one, since this is asked to decide on plain HTTP."""
    parts = urlsplit(f"//{host}")
    return parts.hostname or "", parts.port or 80


def _malformed(where: str) -> ArtifactError:
    return ArtifactError(FailureReason.CORRUPT_ARTIFACT, f"{where}: its manifest is malformed; push it again.")
