"""Requests to a registry on loopback without credentials. Blobs are pushed by buildah."""

import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import configs, kernel
from cluster.errors import ClusterError
from cluster.lifecycle import registry_port
from cluster.places import cache_dir
from cluster.programs import install

_TIMEOUT_S = 20
_START_TIMEOUT_S = 30
_MANIFEST_TYPES = ", ".join(
    [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def serving() -> Iterator[str]:
    """Runs a registry on the storage that the local clusters' registries share, for a build before any cluster is up.

    Yields its address. Raises ClusterError if it does not answer.
    """
    storage = cache_dir() / "registry"
    storage.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        port = registry_port(storage)
        config = Path(folder, "registry.yaml")
        config.write_text(configs.registry(storage, port, host="127.0.0.1"))
        process = subprocess.Popen(
            [install.require("docker-registry"), "serve", str(config)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=kernel.die_with_parent,
        )  # fmt: skip
        try:
            _wait_until_it_answers(f"127.0.0.1:{port}")
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _wait_until_it_answers(registry: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            return check(registry)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


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
