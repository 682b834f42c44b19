"""oci:// against a real registry on loopback, pushed to by the real oras."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import artifact_zoo as zoo
import oras.client
import pytest
from artifact_hub import Fault, Hub

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.inspect import inspect_adapter, inspect_base
from lorapool_artifacts.settings import AdapterLimits, SourceSettings
from lorapool_artifacts.sources.oci import parse_manifest

LIMITS = AdapterLimits(max_rank=8, max_bytes=1_000_000)
BINARY = shutil.which("docker-registry")
USER, PASSWORD = "reader", "pass-word"
HTPASSWD = f"{USER}:$2b$04$glindZfOHhqkEZlRks3d3uHlpusrKW4Mg03EbCXYPmqrjDB2ghS96\n"

needs_registry = pytest.mark.skipif(BINARY is None, reason="docker-registry is not installed")


def run_registry(folder: Path, *, locked: bool) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if locked:
        (folder / "htpasswd").write_text(HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(BINARY), "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from run_registry(tmp_path_factory.mktemp("registry"), locked=False)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from run_registry(tmp_path_factory.mktemp("locked"), locked=True)


def push(host: str, name: str, files: dict[str, bytes], folder: Path, *, login: bool = False) -> None:
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    client = oras.client.OrasClient(insecure=True, auth_backend="basic" if login else "token")
    if login:
        client.auth.set_basic_auth(USER, PASSWORD)
    paths = [str(folder / file) for file in files]
    response = client.push(f"{host}/{name}", files=paths, disable_path_validation=True, quiet=True)
    assert response.status_code == 201
    client.session.close()


def listed(host: str) -> SourceSettings:
    """The settings of an administrator who lists this registry for plain HTTP."""
    return SourceSettings(oci_insecure_hosts=frozenset({host}))


@needs_registry
async def test_an_adapter_is_checked_by_range_reads_and_fetched(registry: str, tmp_path: Path) -> None:
    files = zoo.adapter_files()
    push(registry, "team/lora:v1", files, tmp_path / "src")
    settings = listed(registry)
    resolved = await resolve(f"oci://{registry}/team/lora:v1", settings=settings)
    assert resolved.digest is not None, "layers carry their hash"
    seen = await inspect_adapter(f"oci://{registry}/team/lora:v1", None, resolved.digest, None, LIMITS, settings)
    assert seen.compatibility.ok
    assert seen.revision == resolved.revision
    assert seen.revision.startswith("sha256:")
    path = await fetch(resolved, tmp_path / "cache", seen.digest)
    assert folder_digest(path) == seen.digest
    assert {item.name: item.read_bytes() for item in path.iterdir()} == {
        name: files[name] for name in ("adapter_config.json", "adapter_model.safetensors")
    }


@needs_registry
async def test_a_tag_that_moves_does_not_move_what_was_resolved(registry: str, tmp_path: Path) -> None:
    settings = listed(registry)
    push(registry, "team/moving:v1", zoo.adapter_files(), tmp_path / "old")
    old = await resolve(f"oci://{registry}/team/moving:v1", settings=settings)
    push(registry, "team/moving:v1", zoo.adapter_files(lora_alpha=1), tmp_path / "new")
    again = await resolve(f"oci://{registry}/team/moving:v1", old.revision, settings=settings)
    assert again.digest == old.digest
    assert folder_digest(await fetch(old, tmp_path / "cache", old.digest)) == old.digest
    assert (await resolve(f"oci://{registry}/team/moving:v1", settings=settings)).digest != old.digest


@needs_registry
async def test_a_base_has_facts_and_a_digest_without_a_download(registry: str, tmp_path: Path) -> None:
    push(registry, "team/base:v1", zoo.base_files(), tmp_path / "src")
    seen = await inspect_base(f"oci://{registry}/team/base:v1", None, listed(registry))
    assert seen.digest is not None
    assert seen.files.names == {"team/base", "tiny/llama"}
    assert seen.files.shapes["model.layers.0.mlp.down_proj.weight"] == (zoo.HIDDEN, zoo.INNER)


@needs_registry
async def test_what_is_not_there_is_not_found(registry: str) -> None:
    for reference in ("team/nowhere:v1", f"team/nowhere@sha256:{'0' * 64}"):
        with pytest.raises(ArtifactError) as caught:
            await resolve(f"oci://{registry}/{reference}", settings=listed(registry))
        assert caught.value.reason is FailureReason.SOURCE_NOT_FOUND


@needs_registry
async def test_a_locked_registry_takes_credentials_from_env_or_docker_config(locked: str, tmp_path: Path) -> None:
    push(locked, "team/lora:v1", zoo.adapter_files(), tmp_path / "src", login=True)
    uri = f"oci://{locked}/team/lora:v1"
    with pytest.raises(ArtifactError, match="DOCKER_CONFIG") as caught:
        await resolve(uri, settings=listed(locked))
    assert caught.value.reason is FailureReason.UNAUTHORIZED
    env = {"LORAPOOL_OCI_AUTH_HOST": locked, "LORAPOOL_OCI_USERNAME": USER, "LORAPOOL_OCI_PASSWORD": PASSWORD}
    assert (await inspect_adapter(uri, None, None, None, LIMITS, SourceSettings.from_env(env))).compatibility.ok
    with pytest.raises(ArtifactError) as caught:
        await resolve(uri, settings=SourceSettings.from_env({**env, "LORAPOOL_OCI_PASSWORD": "wrong"}))
    assert caught.value.reason is FailureReason.UNAUTHORIZED
    with pytest.raises(ArtifactError) as caught:
        await resolve(uri, settings=SourceSettings.from_env({**env, "LORAPOOL_OCI_AUTH_HOST": "other"}))
    assert caught.value.reason is FailureReason.UNAUTHORIZED
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {locked: {"auth": auth}}}))
    docker = SourceSettings.from_env({"DOCKER_CONFIG": str(tmp_path)})
    assert (await inspect_adapter(uri, None, None, None, LIMITS, docker)).compatibility.ok


async def test_a_folder_of_an_artifact_is_named_behind_its_tag(hub: Hub) -> None:
    files = {f"checkpoint-500/{name}": data for name, data in zoo.adapter_files().items()}
    blobs = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    manifest = manifest_of(files)

    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, manifest if "/manifests/" in path else blobs[path.rpartition("sha256:")[2]]

    hub.answer = answer  # type: ignore[method-assign]
    uri = f"oci://{hub.host}/a:v1"
    found = await inspect_adapter(f"{uri}/checkpoint-500", None, None, None, LIMITS, listed(hub.host))
    assert found.compatibility.ok
    for whole in (uri, f"oci://{hub.host}/a"):
        with pytest.raises(ArtifactError, match=r"such as oci://127.0.0.1:\d+/a:(v1|latest)/checkpoint-500"):
            await inspect_adapter(whole, None, None, None, LIMITS, listed(hub.host))


async def test_a_bearer_registry_gets_a_token_with_the_credentials_it_was_given(hub: Hub) -> None:
    """The token flow of public registries; the hub's server acts as registry and token service."""
    files = zoo.adapter_files()
    blobs = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    manifest = manifest_of(files)

    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        if path == "/token":
            return 200, {}, b'{"token": "t0"}'
        if hub.requests[-1][2].get("authorization") != "Bearer t0":
            return (
                401,
                {"Www-Authenticate": f'Bearer realm="{hub.url}/token",service="r",scope="repository:a:pull"'},
                b"",
            )
        if "/manifests/" in path:
            return 200, {}, manifest
        return 200, {}, blobs[path.rpartition("sha256:")[2]]

    hub.answer = answer  # type: ignore[method-assign]
    host = hub.host
    assert (await inspect_adapter(f"oci://{host}/a:v1", None, None, None, LIMITS, listed(host))).compatibility.ok
    env = {"LORAPOOL_OCI_AUTH_HOST": host, "LORAPOOL_OCI_USERNAME": USER, "LORAPOOL_OCI_PASSWORD": PASSWORD}
    assert (
        await inspect_adapter(f"oci://{host}/a:v1", None, None, None, LIMITS, SourceSettings.from_env(env))
    ).compatibility.ok
    assert [headers.get("authorization", "")[:5] for _, path, headers in hub.requests if path == "/token"] == [
        "",
        "Basic",
    ]


async def test_a_token_service_at_a_metadata_address_is_refused(hub: Hub) -> None:
    realm = 'Bearer realm="http://169.254.169.254/token",service="r"'
    hub.faults = [Fault("/v2/", status=401, headers={"Www-Authenticate": realm})]
    with pytest.raises(ArtifactError) as caught:
        await resolve(f"oci://{hub.host}/a:v1", settings=listed(hub.host))
    assert caught.value.reason is FailureReason.INVALID_SOURCE


async def test_a_registry_in_the_private_network_is_not_even_connected_to(hub: Hub) -> None:
    """No answer tells whether something listens there, nor with which status it answers."""
    port = hub.host.partition(":")[2]
    for host in (hub.host, f"localhost:{port}", f"x.localhost:{port}", f"[::ffff:127.0.0.1]:{port}", "127.0.0.1:1"):
        with pytest.raises(ArtifactError, match=r"private network|not listed") as caught:
            await resolve(f"oci://{host}/a/b:t403", settings=SourceSettings())
        assert caught.value.reason is FailureReason.INVALID_SOURCE
    assert hub.requests == []


async def test_neither_a_redirect_nor_a_token_service_leads_into_the_private_network(hub: Hub) -> None:
    inner = hub.url.replace("127.0.0.1", "localhost")
    realm = f'Bearer realm="{inner}/token",service="r"'
    leads = (
        Fault("/v2/", status=302, headers={"Location": f"{inner}/admin"}),
        Fault("/v2/", status=401, headers={"Www-Authenticate": realm}),
    )
    for lead in leads:
        hub.faults = [lead]
        with pytest.raises(ArtifactError) as caught:
            await resolve(f"oci://{hub.host}/a:v1", settings=listed(hub.host))
        assert caught.value.reason is FailureReason.INVALID_SOURCE
    assert all(path.startswith("/v2/") for _, path, _ in hub.requests)


@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "[::ffff:169.254.169.254]", "0.0.0.0:5000"])
async def test_a_registry_at_a_forbidden_address_is_refused(host: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        await resolve(f"oci://{host}/a:v1", settings=SourceSettings(oci_insecure_hosts=frozenset({host})))
    assert caught.value.reason is FailureReason.INVALID_SOURCE


@pytest.mark.parametrize(
    ("status", "reason"),
    [(429, FailureReason.RATE_LIMITED), (500, FailureReason.SOURCE_UNAVAILABLE), (403, FailureReason.UNAUTHORIZED)],
)
async def test_each_status_of_the_registry_has_its_reason(hub: Hub, status: int, reason: FailureReason) -> None:
    hub.faults = [Fault("/v2/", status=status, headers={"Retry-After": "5"})]
    with pytest.raises(ArtifactError) as caught:
        await resolve(f"oci://{hub.host}/a:v1", settings=listed(hub.host))
    assert caught.value.reason is reason


def manifest_of(files: dict[str, bytes], **layer: Any) -> bytes:
    layers = [
        {
            "mediaType": "application/octet-stream",
            "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
            "size": len(data),
            "annotations": {"org.opencontainers.image.title": name},
            **layer,
        }
        for name, data in files.items()
    ]
    return json.dumps({"schemaVersion": 2, "layers": layers}).encode()


def test_layers_are_files_by_their_titles() -> None:
    files = parse_manifest(manifest_of({"adapter_config.json": b"{}"}), where="x")
    assert files["adapter_config.json"][0].size_bytes == 2


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", FailureReason.CORRUPT_ARTIFACT),
        (b"[]", FailureReason.CORRUPT_ARTIFACT),
        (b"{}", FailureReason.CORRUPT_ARTIFACT),
        (b'{"layers": [1]}', FailureReason.CORRUPT_ARTIFACT),
        (b'{"manifests": []}', FailureReason.UNSUPPORTED_FORMAT),
        (manifest_of({"a": b"x"}, size=-1), FailureReason.CORRUPT_ARTIFACT),
        (manifest_of({"a": b"x"}, size=True), FailureReason.CORRUPT_ARTIFACT),
        (manifest_of({"a": b"x"}, digest="sha256:../../x"), FailureReason.CORRUPT_ARTIFACT),
        (
            manifest_of({"a": b"x", "b": b"y"}, annotations={"org.opencontainers.image.title": "a"}),
            FailureReason.CORRUPT_ARTIFACT,
        ),
    ],
)
def test_a_malformed_manifest_is_refused(raw: bytes, reason: FailureReason) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_manifest(raw, where="x")
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "layer",
    [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "annotations": None},
        {"mediaType": "application/vnd.oci.image.layer.v1.tar", "annotations": {}},
        {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"},
    ],
)
def test_a_container_image_is_listed_as_archives(layer: dict[str, Any]) -> None:
    [name] = parse_manifest(manifest_of({"adapter_model.safetensors": b"x"}, **layer), where="x")
    assert name.endswith((".tar", ".tar.gz"))
