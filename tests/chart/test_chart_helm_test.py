"""The script of `helm test`, run against correct and faulty gateways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from chart_kit import CHART, of_kind, render

KEY = "the-key-of-the-test"


@contextmanager
def gateway(*, open_to_all: bool = False) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == f"Bearer {KEY}"
            body = {"data": [{"id": "ns/one"}]} if known or open_to_all else {"error": {"code": "invalid_api_key"}}
            self.send_response(200 if known or open_to_all else 401)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def helm_test(url: str, key: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the script as it is in the rendered pod, not the file."""
    [pod] = of_kind(render(), "Pod").values()
    env = {"PATH": os.environ["PATH"], "GATEWAY_URL": url, **({"API_KEY": key} if key else {})}
    script = pod["spec"]["containers"][0]["args"][0]
    return subprocess.run([sys.executable, "-I", "-c", script], env=env, capture_output=True, text=True, check=False)


def test_without_a_key_it_checks_that_strangers_are_refused() -> None:
    with gateway() as url:
        result = helm_test(url)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "gets 401" in result.stdout


def test_with_a_key_it_lists_the_models() -> None:
    with gateway() as url:
        result = helm_test(url, KEY)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 models: ns/one" in result.stdout


def test_a_wrong_key_fails_it() -> None:
    with gateway() as url:
        assert helm_test(url, "wrong").returncode == 1


def test_a_gateway_that_lets_strangers_in_fails_it() -> None:
    with gateway(open_to_all=True) as url:
        result = helm_test(url, KEY)

    assert result.returncode == 1
    assert "FAILED  a call without a key gets 401" in result.stdout


def test_the_pod_reads_its_key_from_the_configured_secret() -> None:
    [pod] = of_kind(render({"test": {"apiKeySecret": {"name": "test-key"}}}), "Pod").values()
    [item] = [item for item in pod["spec"]["containers"][0]["env"] if item["name"] == "API_KEY"]

    assert item["valueFrom"]["secretKeyRef"] == {"name": "test-key", "key": "apiKey"}
    assert pod["spec"]["containers"][0]["env"][0]["value"] == "http://lorapool-gateway.lorapool-system:80"
    assert (CHART / "files" / "helm_test.py").read_text().strip() == pod["spec"]["containers"][0]["args"][0].strip()
