"""The cluster that the demo uses: kubeconfig, programs and registry.

`of_local` describes the one-node cluster of hack/cluster; `existing` uses a context of the user's kubeconfig and a
registry that the user names. The rest of the demo does not depend on which it is.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.schedule import StepError

REPOSITORY = Path(__file__).resolve().parents[2]


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
    """The local cluster's name; None for a cluster of the user."""
    audit_log: Path | None = None

    def kubectl_argv(self) -> list[str]:
        argv = [str(self.kubectl), "--kubeconfig", str(self.kubeconfig)]
        return [*argv, "--context", self.context] if self.context else argv

    def helm_argv(self) -> list[str]:
        argv = [str(self.helm), "--kubeconfig", str(self.kubeconfig)]
        return [*argv, "--kube-context", self.context] if self.context else argv


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
    """A cluster that the user has. Raises StepError, which names what is missing."""
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
