"""The ground the demo stands on: a cluster to talk to, programs to talk with, a registry, ways in from 127.0.0.1.

`local` starts the one-node cluster of hack/cluster; `existing` uses a context of the user's kubeconfig and a registry
the user names. Both give a `Ground`, and the rest of the demo does not know which it got.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.steps import StepError, Steps

REPOSITORY = Path(__file__).resolve().parents[2]
DISK_NEEDED_GIB = 25


@dataclass(frozen=True)
class Ground:
    kubeconfig: Path
    context: str | None
    kubectl: Path
    helm: Path
    push_registry: str
    """Where this machine pushes images and artifacts to (host:port or host/path)."""
    pull_registry: str
    """The same registry as containerd on the node names it."""
    artifact_registry: str
    """The same registry as pods reach it, for oci:// sources."""
    insecure: bool
    """The registry speaks plain HTTP."""
    prometheus_url: str
    cluster: str | None
    """Name of the local cluster; None for a cluster of the user's."""
    audit_log: Path | None = None

    def kubectl_argv(self) -> list[str]:
        argv = [str(self.kubectl), "--kubeconfig", str(self.kubeconfig)]
        return [*argv, "--context", self.context] if self.context else argv

    def helm_argv(self) -> list[str]:
        argv = [str(self.helm), "--kubeconfig", str(self.kubeconfig)]
        return [*argv, "--kube-context", self.context] if self.context else argv


def check_machine() -> None:
    """What a local cluster needs, before anything long starts."""
    if sys.platform != "linux":
        raise StepError(
            "The local cluster needs Linux. On another system use a cluster you have:\n"
            "  make demo CONTEXT=<name> REGISTRY=<registry you can push to>"
        )
    if os.geteuid() != 0:
        raise StepError(
            "The local cluster needs root (it starts a kubelet and containerd). Run `sudo -E make demo`, or use a\n"
            "cluster you have: make demo CONTEXT=<name> REGISTRY=<registry you can push to>"
        )
    free = shutil.disk_usage(REPOSITORY).free / 2**30
    if free < DISK_NEEDED_GIB:
        raise StepError(
            f"{free:.0f} GiB of disk are free, {DISK_NEEDED_GIB} are needed (torch alone is 6). Free some, or move\n"
            "the cache with LORAPOOL_CACHE=<folder on another disk>."
        )


def local(steps: Steps, name: str) -> Ground:
    """Installs, builds and starts the local cluster of that name."""
    cluster = [sys.executable, str(REPOSITORY / "hack" / "cluster")]
    with steps.step("Install what a node needs (containerd, runc, buildah, …)"):
        steps.command([*cluster, "install"], remedy="The line above names the package.", timeout_s=900)
    with steps.step("Build Kubernetes, Helm, CoreDNS, Prometheus (first time: a quarter of an hour)"):
        steps.command([*cluster, "build"], remedy="Run `make binaries` to see it alone.", timeout_s=3000)
    with steps.step("Start the one-node cluster"):
        out = steps.command(
            [*cluster, "up", "--name", name, "--json"],
            remedy="`make demo-down` clears what was started; then try again.",
            timeout_s=300,
        )
    return of_local(json.loads(out))


def of_local(info: dict[str, Any]) -> Ground:
    """A Ground from the JSON of `hack/cluster up`."""
    bin_dir = Path(info["bin_dir"])
    return Ground(
        kubeconfig=Path(info["kubeconfig"]),
        context=None,
        kubectl=bin_dir / "kubectl",
        helm=bin_dir / "helm",
        push_registry=info["registry"],
        pull_registry=info["registry"],
        artifact_registry=info["registry_in_cluster"],
        insecure=True,
        prometheus_url=info["prometheus_url"],
        cluster=info["name"],
        audit_log=Path(info["audit_log"]),
    )


def existing(context: str, registry: str | None) -> Ground:
    """A cluster the user has. Raises StepError naming what is missing."""
    kubectl, helm = shutil.which("kubectl"), shutil.which("helm")
    if not kubectl or not helm:
        raise StepError("With CONTEXT= the demo uses your own kubectl and helm: put both on the PATH.")
    if not registry:
        raise StepError("With CONTEXT= name a registry the cluster can pull from: REGISTRY=ghcr.io/me/lorapool")
    return Ground(
        kubeconfig=Path(os.environ.get("KUBECONFIG", Path.home() / ".kube" / "config")),
        context=context,
        kubectl=Path(kubectl),
        helm=Path(helm),
        push_registry=registry,
        pull_registry=registry,
        artifact_registry=registry,
        insecure=False,
        prometheus_url=os.environ.get("PROMETHEUS_URL", ""),
        cluster=None,
    )
