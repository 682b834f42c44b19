"""W6 with kubectl against a real API server; the test simulates node, controllers and gateway."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import scale_to_zero
from apiserver import REPOSITORY, ApiServer, running_apiserver

pytestmark = pytest.mark.apiserver

NAMESPACE = "lorapool"
WAKE_S, START_S, LOAD_S, AFTER_S = 0.3, 0.5, 0.7, 0.2
KEY = "lp-" + "w" * 43


class Node:
    """The base's pod: made, run and made ready on the first request; deleted once the base may idle for a second."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self.asked = 0

    def wake(self) -> None:
        self.asked += 1
        time.sleep(WAKE_S)
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"pod-{self.asked}", "labels": {"lorapool.dev/base": scale_to_zero.BASE}},
            "spec": {"containers": [{"name": "runtime", "image": "none"}], "automountServiceAccountToken": False},
        }
        self._kubectl("create", "-f", "-", stdin=json.dumps(pod))
        time.sleep(START_S)
        self._status(ready=False)
        time.sleep(LOAD_S)
        self._status(ready=True)
        time.sleep(AFTER_S)

    def idle(self, until: threading.Event) -> None:
        while not until.wait(0.3):
            if (
                json.loads(self._kubectl("get", "bm", scale_to_zero.BASE, "-o", "json"))["spec"]["scaling"]["idleAfter"]
                == "1s"
            ):
                self._kubectl("delete", "pods", "-l", scale_to_zero.POD_LABEL, "--grace-period=0", "--force")

    def _status(self, *, ready: bool) -> None:
        container = {
            "name": "runtime", "image": "none", "imageID": "", "ready": ready, "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }  # fmt: skip
        status = {"conditions": [{"type": "Ready", "status": str(ready)}], "containerStatuses": [container]}
        patch = json.dumps({"status": status})
        self._kubectl("patch", "pod", f"pod-{self.asked}", "--subresource=status", "--type=merge", "-p", patch)

    def _kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._server.kubectl("-n", NAMESPACE, *arguments, stdin=stdin)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("api")) as server:
        server.kubectl("create", "namespace", NAMESPACE)
        server.kubectl("-n", NAMESPACE, "create", "serviceaccount", "default")  # no controllers run here
        server.install_crds(REPOSITORY / "crds" / "lorapool.dev_basemodels.yaml")
        yield server


@pytest.fixture
def gateway(server: ApiServer) -> Iterator[tuple[Node, str]]:
    node, stop = Node(server), threading.Event()
    base = {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "BaseModel",
        "metadata": {"name": scale_to_zero.BASE, "namespace": NAMESPACE},
        "spec": {"source": {"uri": "hf://org/x"}, "scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": "10m"}},
    }
    server.kubectl("apply", "-f", "-", stdin=json.dumps(base))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            right = self.headers["authorization"] == f"Bearer {KEY}" and asked["stream"]
            node.wake()
            self.send_response(200 if right else 401)
            self.end_headers()
            self.wfile.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threads = [threading.Thread(target=http.serve_forever), threading.Thread(target=node.idle, args=(stop,))]
        for thread in threads:
            thread.start()
        yield node, f"http://127.0.0.1:{http.server_port}"
        stop.set()
        http.shutdown()
        for thread in threads:
            thread.join()


def test_each_round_starts_from_no_pod_and_the_wait_is_cut_where_the_pod_changed(
    server: ApiServer, gateway: tuple[Node, str], tmp_path: Path
) -> None:
    node, url = gateway
    summary = {
        "kubectl": str(server.bin_dir / "kubectl"),
        "kubeconfig": str(server.kubeconfig),
        "namespace": NAMESPACE,
        "gateway_url": url,
        "api_key": KEY,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    records = {record.name: record for record in scale_to_zero.measure(tmp_path / "summary.json", 2)}
    assert node.asked == 2
    assert all(len(record.runs) == 2 for record in records.values())
    # Each part is at least the test's sleep in it; the rest depends on the machine.
    for name, least in {"wake_ms": WAKE_S * 1e3, "pod_start_s": START_S, "model_load_s": LOAD_S}.items():
        assert min(records[f"w6.{name}"].runs) > least * 0.9
    total = WAKE_S + START_S + LOAD_S + AFTER_S
    assert min(records["w6.answer_s"].runs) > total
    spec = json.loads(server.kubectl("-n", NAMESPACE, "get", "bm", scale_to_zero.BASE, "-o", "json"))["spec"]
    assert spec["scaling"]["idleAfter"] == "10m", "as it was before"
