"""Pushing a folder as an OCI artifact: what arrives, what a second push sends, what is refused."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from push import ADAPTER_TYPE, MODEL_TYPE, TITLE, PushError, is_this_machine, push


class SmallRegistry(ThreadingHTTPServer):
    """An in-memory registry with what a push needs: checks digests as a real one does, and counts uploads."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}  # by "repository:tag"
        self.uploads = 0
        self.refuse_uploads = False

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallRegistry

    def do_HEAD(self) -> None:
        repository, kind, name = self._address()
        if kind == "blobs" and name in self.server.blobs:
            return self._answer(200)
        manifest = self.server.manifests.get(f"{repository}:{name}")
        if kind == "manifests" and manifest is not None:
            return self._answer(200, {"Docker-Content-Digest": _digest(manifest)})
        return self._answer(404)

    def do_GET(self) -> None:
        return self._answer(200 if self.path == "/v2/" else 404)

    def do_POST(self) -> None:
        if self.server.refuse_uploads:
            return self._answer(507)
        return self._answer(202, {"Location": self.path.rstrip("/") + "/one"})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        repository, kind, name = self._address()
        if kind == "manifests":
            self.server.manifests[f"{repository}:{name}"] = data
            return self._answer(201)
        (said,) = parse_qs(urlsplit(self.path).query)["digest"]
        if said != _digest(data):
            return self._answer(400)
        self.server.blobs[said] = data
        self.server.uploads += 1
        return self._answer(201)

    def _address(self) -> tuple[str, str, str]:
        parts = urlsplit(self.path).path.removeprefix("/v2/").split("/")
        at = next(index for index, part in enumerate(parts) if part in {"blobs", "manifests"})
        return "/".join(parts[:at]), parts[at], parts[-1]

    def _answer(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def registry() -> Iterator[SmallRegistry]:
    with SmallRegistry() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}\n")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "train.jsonl").write_text("not part of the artifact\n")
    return folder


def test_each_file_of_an_adapter_is_a_layer_titled_by_its_name(tmp_path: Path, registry: SmallRegistry) -> None:
    digest = push(adapter(tmp_path / "a"), f"{registry.host}/demo/routing:1")
    manifest = json.loads(registry.manifests["demo/routing:1"])
    assert manifest["artifactType"] == ADAPTER_TYPE
    titles = [layer["annotations"][TITLE] for layer in manifest["layers"]]
    assert titles == ["adapter_config.json", "adapter_model.safetensors"]
    assert registry.blobs[manifest["layers"][1]["digest"]] == b"weights"
    assert registry.blobs[manifest["config"]["digest"]] == b"{}"
    assert digest.startswith("sha256:")


def test_a_second_push_sends_nothing_and_gives_the_same_digest(tmp_path: Path, registry: SmallRegistry) -> None:
    folder = adapter(tmp_path / "a")
    target = f"{registry.host}/demo/routing:1"
    first = push(folder, target)
    sent = registry.uploads
    assert push(folder, target) == first
    assert registry.uploads == sent


def test_only_the_file_that_changed_is_sent_again(tmp_path: Path, registry: SmallRegistry) -> None:
    folder = adapter(tmp_path / "a")
    target = f"{registry.host}/demo/routing:1"
    first = push(folder, target)
    sent = registry.uploads
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    assert push(folder, target) != first
    assert registry.uploads == sent + 1


def test_a_model_is_every_plain_file_of_its_folder(tmp_path: Path, registry: SmallRegistry) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    push(tmp_path, f"{registry.host}/demo/base:1")
    manifest = json.loads(registry.manifests["demo/base:1"])
    assert manifest["artifactType"] == MODEL_TYPE
    titles = [layer["annotations"][TITLE] for layer in manifest["layers"]]
    assert titles == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_folder_without_safetensors_is_refused(tmp_path: Path, registry: SmallRegistry) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PushError, match="safetensors"):
        push(tmp_path, f"{registry.host}/demo/base:1")
    assert registry.uploads == 0


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PushError, match="no such folder"):
        push(tmp_path / "nowhere", "127.0.0.1:1/demo/base:1")


def test_a_registry_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PushError, match=r"127\.0\.0\.1:1/demo/routing:1"):
        push(adapter(tmp_path / "a"), "127.0.0.1:1/demo/routing:1")


def test_a_registry_that_refuses_is_named(tmp_path: Path, registry: SmallRegistry) -> None:
    registry.refuse_uploads = True
    with pytest.raises(PushError):
        push(adapter(tmp_path / "a"), f"{registry.host}/demo/routing:1")
    assert registry.manifests == {}


@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1:5000", True), ("localhost:5000", True), ("localhost", True), ("registry.example:5000", False)],
)
def test_plain_http_is_for_this_machine(host: str, answer: bool) -> None:
    assert is_this_machine(host) is answer
