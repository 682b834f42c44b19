"""The three questions asked of a registry without credentials on loopback; pushing blobs is buildah's part."""

import urllib.error
import urllib.request

from cluster.errors import ClusterError

_TIMEOUT_S = 20
_MANIFEST_TYPES = ", ".join(
    [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def check(registry: str) -> None:
    """An error that says what to do when nothing answers there."""
    try:
        _opener.open(f"http://{registry}/v2/", timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no registry answers at {registry}: {error}", remedy="`python3 hack/cluster up` prints its registry"
        ) from None


def manifest(registry: str, repository: str, tag: str) -> tuple[bytes, str] | None:
    """The manifest of a tag and its media type, or None."""
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
    """Gives a manifest that the registry has one more name."""
    request = urllib.request.Request(
        f"http://{registry}/v2/{repository}/manifests/{name}",
        data=content[0],
        headers={"Content-Type": content[1]},
        method="PUT",
    )
    _opener.open(request, timeout=_TIMEOUT_S).close()
