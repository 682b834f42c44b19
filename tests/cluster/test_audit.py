"""`make audit` with the real pip-audit, against a service of advisories on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VULNERABLE = "aiohttp"
ADVISORY = {
    "id": "PYSEC-0000-1",
    "summary": "An invented advisory.",
    "affected": [
        {
            "package": {"name": VULNERABLE, "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


class _Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"vulns": [ADVISORY]} if asked["package"]["name"] == VULNERABLE else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def advisories() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def audit(url: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "hack" / "audit.py"), "--vulnerability-service", "osv", "--osv-url", url]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [*command, "--cache-dir", str(cache)], capture_output=True, text=True, env=environment, check=False
    )


def test_a_vulnerable_locked_version_is_named_with_its_fix_and_fails(tmp_path: Path) -> None:
    with advisories() as url:
        done = audit(url, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 known vulnerabilities" in done.stdout
    assert "PYSEC-0000-1, fixed in 99.0" in done.stdout


def test_a_service_that_cannot_be_reached_is_reported_and_passes(tmp_path: Path) -> None:
    with advisories() as url:
        pass
    done = audit(url, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("skipped, because no advisories can be reached") == 3  # one line for each image
