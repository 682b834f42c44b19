"""The programs of a cluster and their versions; a change here gives a new folder of binaries.

Every program but Prometheus is built from one Go module, `go/`, whose go.mod and go.sum pin what it is built from, so
that each library is compiled once for all of them. Helm and CoreDNS stay on the versions that use Kubernetes 1.34's
libraries for the same reason. Kubernetes stays on 1.34: later kubelets refuse cgroup v1, which many machines still run.
"""

from typing import NamedTuple

KUBERNETES = "1.34.4"
MINIMUM_GO = (1, 25)

PACKAGES = ("./control", "./node", "./etcd", "./coredns", "./pause", "helm.sh/helm/v4/cmd/helm")
LINKS = {
    "control": ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"),
    "node": ("kubelet", "kube-proxy"),
}
"""Programs in one file: the name by which it is called picks the program."""

FROM_DEBIAN = {"prometheus": ("prometheus", "promtool")}
"""Debian package -> the programs taken from it where the machine has none of its own."""

_MAJOR, _MINOR, _ = KUBERNETES.split(".")
_VERSION = "k8s.io/component-base/version"
_HELM_DEFAULTS = "helm.sh/helm/v4/pkg/chart/common"  # the Kubernetes that `helm template` renders for
LINK_FLAGS = " ".join(
    [
        "-s -w",
        f"-X {_VERSION}.gitVersion=v{KUBERNETES} -X {_VERSION}.gitMajor={_MAJOR} -X {_VERSION}.gitMinor={_MINOR}",
        f"-X {_HELM_DEFAULTS}.k8sVersionMajor={_MAJOR} -X {_HELM_DEFAULTS}.k8sVersionMinor={_MINOR}",
    ]
)
# Without inlining and debug information the compiler takes half as long; the programs are a little slower.
COMPILE_FLAGS = "all=-dwarf=false -l"


class Definition(NamedTuple):
    """A custom resource definition in a Go module."""

    module: str
    version: str
    sum: str
    """Hash of the module's files, as go.sum has it."""
    path: str


DEFINITIONS = {
    "leaderworkersets": Definition(
        "sigs.k8s.io/lws",
        "v0.8.0",
        "h1:DdhJ8QabwTfWgbgaHH2gdf8twliioHaoSfmDXRYEVU0=",
        "config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml",
    )
}
"""Those that tests need. LeaderWorkerSet 0.8 is made with Kubernetes 1.34's pods."""
