"""Requests to a registry on loopback without credentials. Blobs are pushed by buildah."""

import urllib.error
import urllib.request

from cluster.errors import ClusterError
from cluster.places import cache_dir

_TIMEOUT_S = 20
_MANIFEST_TYPES = ", ".join(
    [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def is_stored(repository: str, tag: str) -> bool:
    """Whether the storage that the local clusters' registries share has the tag; needs no running registry."""
    tags = cache_dir() / "registry" / "docker" / "registry" / "v2" / "repositories" / repository / "_manifests" / "tags"
    return (tags / tag / "current" / "link").exists()


def check(registry: str) -> None:
    """Raises ClusterError when no registry answers there."""
    try:
        _opener.open(f"http://{registry}/v2/", timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no registry answers at {registry}: {error}", remedy="`python3 hack/cluster up` prints its registry"
        ) from None


def manifest(registry: str, repository: str, tag: str) -> tuple[bytes, str] | None:
    """The manifest of a tag and its media type, or None where there is no such tag."""
    request = urllib.request.Request(
        f"http://{registry}/v2/{repository}/manifests/{tag}", headers={"Accept": _MANIFEST_TYPES}
    )
    try:
        with _opener.open(request, timeout=_TIMEOUT_S) as response:
            return response.read(), response.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def tag(registry: str, repository: str, content: tuple[bytes, str], name: str) -> None:
    """Adds a tag to a manifest that the registry has."""
    request = urllib.request.Request(
        f"http://{registry}/v2/{repository}/manifests/{name}",
        data=content[0],
        headers={"Content-Type": content[1]},
        method="PUT",
    )
    _opener.open(request, timeout=_TIMEOUT_S).close()
