"""Pods with a runtime's labels, in another namespace and in the base's own, get no request and are not counted."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from e2e_world import BASE, World

OTHER_NAMESPACE = "intruder"
NAME = "forged"
ADOPTED_BY = "pod-template-hash"
"""With this label the ReplicaSet would adopt the pod and delete it as one too many."""
LISTENING = "listening"
SERVER = f"""
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        print("REQUEST", self.command, self.path, dict(self.headers), flush=True)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{{}}")
    do_GET = do_POST = do_PUT = do_DELETE = answer

server = http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler)
print("{LISTENING}", flush=True)
server.serve_forever()
"""


def _pod(runtime: dict[str, Any], namespace: str) -> dict[str, Any]:
    """A pod like the runtime's own, but of no ReplicaSet, that prints each request which it receives."""
    container = runtime["spec"]["containers"][0]
    labels = {key: value for key, value in runtime["metadata"]["labels"].items() if key != ADOPTED_BY}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NAME, "namespace": namespace, "labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": runtime["spec"]["securityContext"],
            "containers": [
                {
                    "name": "runtime",
                    "image": container["image"],
                    "command": ["python", "-c", SERVER],
                    "ports": container["ports"],
                    "securityContext": container["securityContext"],
                    "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
                }
            ],
        },
    }


def _slice(real: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any]:
    """An EndpointSlice with the labels and ports of the real one, and the forged pod's address."""
    meta = pod["metadata"]
    target = {"kind": "Pod", "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]}
    conditions = {"ready": True, "serving": True, "terminating": False}
    return {
        "apiVersion": real["apiVersion"],
        "kind": real["kind"],
        "metadata": {"name": NAME, "namespace": meta["namespace"], "labels": real["metadata"]["labels"]},
        "addressType": "IPv4",
        "ports": real["ports"],
        "endpoints": [{"addresses": [pod["status"]["podIP"]], "conditions": conditions, "targetRef": target}],
    }


@pytest.fixture
def forged(world: World) -> Iterator[dict[str, dict[str, Any]]]:
    """The two pods by namespace, listening, each with an EndpointSlice."""
    task = world.tasks[0]
    world.chat(task)  # the base has a pod
    runtime = world.runtime_pods()[0]
    real = world.get("endpointslices", "-l", f"kubernetes.io/service-name={BASE}-runtime")["items"][0]
    world.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OTHER_NAMESPACE}})
    namespaces = (world.namespace, OTHER_NAMESPACE)
    pods: dict[str, dict[str, Any]] = {}
    try:
        for namespace in namespaces:
            world.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(_pod(runtime, namespace)))
        for namespace in namespaces:
            world.kubectl("wait", "-n", namespace, f"pod/{NAME}", "--for=condition=Ready", "--timeout=110s")
            pods[namespace] = json.loads(world.kubectl("get", "-n", namespace, "pod", NAME, "-o", "json"))
            slice_ = json.dumps(_slice(real, pods[namespace]))
            world.kubectl("apply", "-n", namespace, "-f", "-", stdin=slice_)
        yield pods
    finally:
        world.kubectl("delete", "endpointslice,pod", NAME, "--ignore-not-found")
        world.kubectl("delete", "namespace", OTHER_NAMESPACE, "--ignore-not-found", "--wait=false")


def test_pods_with_forged_labels_and_endpoints_get_nothing_and_are_counted_nowhere(
    world: World, forged: dict[str, dict[str, Any]]
) -> None:
    questions = 12
    for number in range(questions):
        task = world.tasks[number % len(world.tasks)]
        answer, header = world.chat(task)
        assert (answer, header) == (world.answer(task), world.header(task))
    for namespace, pod in forged.items():
        log = world.kubectl("logs", "-n", namespace, NAME)
        assert LISTENING in log
        assert "REQUEST" not in log, f"the forged pod of {namespace} received {log}"
        status = json.dumps([world.get("bm")["items"], world.get("lora")["items"]])
        assert pod["metadata"]["uid"] not in status
        for component in ("operator", "gateway"):
            assert all(NAME not in text for text in world.scrape(component))
