"""An in-memory registry with the part of the distribution API that a push needs.

Used by test_model_push.py. It checks digests as a real one does and counts uploads, so a test can see what was sent.
"""

from __future__ import annotations

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class SmallRegistry(ThreadingHTTPServer):
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
