"""Tells Prometheus which pods to scrape: those that ask for it by annotation, as a file that Prometheus watches.

Debian's Prometheus is built without discovery in Kubernetes, so this component lists the pods in its place.
Run as `python3 targets.py KUBECONFIG FILE` by the cluster's supervisor; standard library only.
"""

import json
import os
import ssl
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

INTERVAL_S = 2.0
_ANNOTATION = "prometheus.io"
_COMPONENT = "app.kubernetes.io/component"


def targets(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The running pods to scrape in Prometheus's file format, with the labels that a PodMonitor would give."""
    return [_target(pod) for pod in pods if _is_scraped(pod)]


def _annotation(pod: dict[str, Any], name: str) -> str:
    return str((pod["metadata"].get("annotations") or {}).get(f"{_ANNOTATION}/{name}", ""))


def _is_scraped(pod: dict[str, Any]) -> bool:
    status = pod.get("status", {})
    runs = status.get("phase") == "Running" and bool(status.get("podIP"))
    return runs and _annotation(pod, "scrape") == "true" and _annotation(pod, "port").isdecimal()


def _target(pod: dict[str, Any]) -> dict[str, Any]:
    about = pod["metadata"]
    labels = {"namespace": about["namespace"], "pod": about["name"], "node": pod["spec"].get("nodeName", "")}
    if component := (about.get("labels") or {}).get(_COMPONENT):
        labels["job"] = f"{about['namespace']}/{component}"
    if path := _annotation(pod, "path"):
        labels["__metrics_path__"] = path
    if (scheme := _annotation(pod, "scheme")) in ("http", "https"):
        labels["__scheme__"] = scheme
    return {"targets": [f"{pod['status']['podIP']}:{_annotation(pod, 'port')}"], "labels": labels}


class Pods:
    """Lists all pods with the credentials of a kubeconfig that names a client certificate."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())  # our own kubeconfigs are JSON
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        context = ssl.create_default_context(cafile=cluster["certificate-authority"])
        context.load_cert_chain(user["client-certificate"], user["client-key"])
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({})
        )
        # From the API server's watch cache: cheap enough to ask every few seconds.
        self._url = f"{cluster['server']}/api/v1/pods?resourceVersion=0"

    def list(self) -> list[dict[str, Any]]:
        with self._opener.open(self._url, timeout=10) as response:
            items: list[dict[str, Any]] = json.load(response)["items"]
        return items


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """Replaces the file if its content changes."""
    text = json.dumps(found, indent=1, sort_keys=True)
    if not path.exists() or path.read_text() != text:
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, path)


def main(kubeconfig: str, file: str) -> None:
    pods = Pods(Path(kubeconfig))
    while True:
        try:
            write(Path(file), targets(pods.list()))
        except OSError as error:  # the API server restarts; the last targets stay
            print(f"cannot list the pods: {error}", file=sys.stderr, flush=True)
        time.sleep(INTERVAL_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
