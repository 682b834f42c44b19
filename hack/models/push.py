"""Pushes a model or adapter folder to a registry as an OCI artifact: `push.py FOLDER HOST/REPOSITORY:TAG`.

Each file is one layer whose title annotation is the file's name, which is what an oci:// source of Lorapool reads; the
artifact type distinguishes models from adapters. What the registry has is not sent again. Credentials are those of
`docker login`. Prints the digest. A folder without safetensors is refused, and so is plain HTTP to another machine
unless `--insecure` is given.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import json
import sys
from pathlib import Path
from typing import Any

import oras.container
import oras.provider
import requests

MODEL_TYPE = "application/vnd.lorapool.model.v1"
ADAPTER_TYPE = "application/vnd.lorapool.adapter.v1"
FILE_TYPE = "application/vnd.lorapool.file.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"
REACH_TIMEOUT_S = 15
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class PushError(Exception):
    """The folder cannot be pushed; the text says why."""


def push(folder: Path, target: str, *, insecure: bool = False) -> str:
    """Pushes the folder's files under the name `target` and returns the manifest's digest. Raises PushError."""
    kind, files = artifact(folder)
    layers = [{**describe(file, FILE_TYPE), "annotations": {TITLE: file.name}} for file in files]
    manifest = manifest_bytes(kind, layers)
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    container = oras.container.Container(target)
    plain = insecure or is_this_machine(container.registry)
    registry = oras.provider.Registry(hostname=container.registry, insecure=plain, auth_backend="token")
    registry.auth.load_configs(container)
    address = f"{registry.prefix}://{container.manifest_url()}"
    try:
        # oras retries for minutes where nothing listens: ask once first. Any HTTP status is a registry.
        requests.get(f"{registry.prefix}://{container.registry}/v2/", timeout=REACH_TIMEOUT_S).close()
        there = registry.do_request(address, "HEAD", headers={"Accept": MANIFEST_TYPE})
        if there.headers.get("Docker-Content-Digest") == digest:
            return digest
        for file, layer in zip(files, layers, strict=True):
            _accepted(registry.upload_blob(str(file), container, layer), file.name)
        _upload_empty(registry, container)
        sent = registry.do_request(address, "PUT", headers={"Content-Type": MANIFEST_TYPE}, data=manifest)
        _accepted(sent, "the manifest")
    except (requests.RequestException, ValueError) as error:
        raise PushError(f"{target}: {error}") from error
    finally:
        registry.session.close()
    return digest


def artifact(folder: Path) -> tuple[str, list[Path]]:
    """Artifact type and files, by name. An adapter is its two files; a model is every plain file of its folder."""
    if not folder.is_dir():
        raise PushError(f"{folder}: there is no such folder")
    if (folder / ADAPTER_FILES[0]).is_file():
        files = [folder / name for name in ADAPTER_FILES]
        kind = ADAPTER_TYPE
    else:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        kind = MODEL_TYPE
    if not all(file.is_file() for file in files) or not any(file.suffix == ".safetensors" for file in files):
        raise PushError(f"{folder}: neither an adapter ({', '.join(ADAPTER_FILES)}) nor a model (*.safetensors)")
    return kind, files


def describe(file: Path, media_type: str) -> dict[str, Any]:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": file.stat().st_size}


def manifest_bytes(kind: str, layers: list[dict[str, Any]]) -> bytes:
    """The same files give the same bytes, hence the same digest, on every machine and at every time."""
    empty = b"{}"
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": kind,
        "config": {
            "mediaType": EMPTY_TYPE,
            "digest": f"sha256:{hashlib.sha256(empty).hexdigest()}",
            "size": len(empty),
        },
        "layers": layers,
    }
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def is_this_machine(host: str) -> bool:
    name = host.rpartition(":")[0] if host.count(":") == 1 else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _upload_empty(registry: Any, container: Any) -> None:
    with oras.provider.temporary_empty_config() as path:
        _accepted(registry.upload_blob(path, container, describe(Path(path), EMPTY_TYPE)), "the empty config")


def _accepted(response: requests.Response, what: str) -> None:
    if response.status_code not in (200, 201, 202):
        raise PushError(f"the registry refused {what}: {response.status_code} {response.text[:300]}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Push a model or adapter folder as an OCI artifact.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", metavar="HOST/REPOSITORY:TAG")
    parser.add_argument("--insecure", action="store_true", help="plain HTTP also to another machine")
    arguments = parser.parse_args()
    try:
        print(push(arguments.folder, arguments.target, insecure=arguments.insecure))
    except PushError as error:
        print(f"push: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
