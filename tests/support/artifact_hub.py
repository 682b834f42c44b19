"""A model hub on loopback: the part of the Hugging Face API that huggingface_hub uses, with faults on demand."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LFS_FROM_BYTES = 1000
"""Larger files are in LFS and so carry a sha256, as on the hub; a config.json does not."""


@dataclass
class Fault:
    """A fault that replaces the response to requests whose path contains `part`."""

    part: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0
    """Pause after every few bytes of a body."""
    break_after: int | None = None
    """Close the connection after so many body bytes."""
    change: Callable[[bytes], bytes] | None = None
    """Another body under the same name."""
    times: int = 1_000_000


class Hub:
    """Serves the files in `repos[name]`, each repository at one commit. A context manager."""

    def __init__(self, certificate: Path | None = None) -> None:
        """`certificate`: a PEM file with certificate and key; None: plain HTTP."""
        self.repos: dict[str, dict[str, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.token: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._scheme = "http" if certificate is None else "https"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    @property
    def host(self) -> str:
        """Its address and port."""
        return self.url.partition("://")[2]

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit_of(self, repo: str) -> str:
        lines = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.repos[repo].items())
        return hashlib.sha1(repr(lines).encode()).hexdigest()

    def bodies_sent_of(self, name: str) -> int:
        return sum(1 for method, path, _ in self.requests if method == "GET" and path.endswith(f"/{name}"))

    def fault_for(self, path: str) -> Fault:
        for fault in self.faults:
            if fault.part in path and fault.times > 0:
                fault.times -= 1
                return fault
        return Fault("")

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return 404, {}, b""

    def _revision_error(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes] | None:
        if repo not in self.repos:
            return (
                401 if self.token is None else 404,
                {"X-Error-Code": "RepoNotFound"},
                b'{"error":"Repository not found"}',
            )
        if revision not in ("main", self.commit_of(repo)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error":"Invalid rev id"}'
        return None

    def _info(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        if error := self._revision_error(repo, revision):
            return error
        siblings = []
        for name, data in self.repos[repo].items():
            item: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if len(data) > LFS_FROM_BYTES:
                item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(item)
        body = {
            "id": repo,
            "modelId": repo,
            "sha": self.commit_of(repo),
            "private": False,
            "tags": [],
            "siblings": siblings,
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _file(self, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if error := self._revision_error(repo, revision):
            return error
        if name not in self.repos[repo]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = self.repos[repo][name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit_of(repo)}
        return 200, headers, data


def self_signed(folder: Path) -> Path:
    """A PEM file with a key and a certificate for 127.0.0.1 that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "hub.pem"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return file


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve(send_body=True)

        def do_HEAD(self) -> None:
            self._serve(send_body=False)

        def _serve(self, *, send_body: bool) -> None:
            path = urlsplit(self.path).path
            headers_in = {key.lower(): value for key, value in self.headers.items()}
            hub.requests.append((self.command, path, headers_in))
            fault = hub.fault_for(path)
            time.sleep(fault.delay_s)
            if hub.token is not None and headers_in.get("authorization") != f"Bearer {hub.token}":
                status, headers, body = 401, {"X-Error-Code": "GatedRepo"}, b""
            elif fault.status != 200:
                status, headers, body = fault.status, fault.headers, b""
            else:
                status, headers, body = hub.answer(path)
            if fault.change is not None:
                body = fault.change(body)
            if status == 200 and "range" in headers_in and "/resolve/" in path:
                status, body = self._cut(headers_in["range"], body, headers)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send_body:
                self._send(body, fault)

        @staticmethod
        def _cut(wanted: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(body) - 1), len(body) - 1)
            if start >= len(body):
                return 416, b""
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            return 206, body[start : end + 1]

        def _send(self, body: bytes, fault: Fault) -> None:
            try:
                if fault.break_after is not None:
                    self.wfile.write(body[: fault.break_after])
                    self.wfile.flush()
                    self.close_connection = True
                elif fault.drip_s:
                    for start in range(0, len(body), 8):
                        self.wfile.write(body[start : start + 8])
                        self.wfile.flush()
                        time.sleep(fault.drip_s)
                else:
                    self.wfile.write(body)
            except OSError:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
