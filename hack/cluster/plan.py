"""Decides what runs: every component's command line, order, readiness probe and configuration files. Pure.

Inside its own network namespace every whole cluster has the same addresses and ports; only the ports on the host differ
from cluster to cluster.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster import configs
from cluster.places import HACK

NODE_IP = "10.245.0.1"
POD_CIDR = "10.244.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
SANDBOX_IMAGE = "lorapool.local/pause:1"
REGISTRY_IN_CLUSTER = "registry.kube-system.svc.cluster.local:5000"


@dataclass(frozen=True)
class Ports:
    """The cluster's ports on the host's 127.0.0.1. etcd's two are used only without a network namespace."""

    api: int
    registry: int = 0
    prometheus: int = 0
    etcd: int = 2379
    etcd_peer: int = 2380
    controllers: int = 10257


@dataclass(frozen=True)
class Spec:
    """Everything that a Plan depends on."""

    name: str
    whole: bool  # False: only etcd and the API server, as an ordinary user, in the host's namespaces
    state: Path
    programs: Path
    ports: Ports
    token: str
    controllers: bool = True  # the controller manager, in the API-server mode
    registry_storage: Path = Path("/nonexistent")
    tools: dict[str, str] = field(default_factory=dict)  # containerd, ctr, docker-registry, python3: full paths
    cni_folder: str = ""
    cgroup_root: str = ""
    rule_files: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """The address the API server is reached by from where its components run."""
        return NODE_IP if self.whole else "127.0.0.1"

    @property
    def api_port(self) -> int:
        return 6443 if self.whole else self.ports.api


@dataclass(frozen=True)
class Component:
    """A process to keep running, or (`task`) one to run until it succeeds once."""

    name: str
    argv: tuple[str, ...]
    after: tuple[str, ...] = ()
    ready_url: str = ""
    task: bool = False
    deadline_s: float = 60.0
    remedy: str = ""


@dataclass(frozen=True)
class Plan:
    components: tuple[Component, ...]
    files: dict[str, str]  # path below the state folder -> text
    forwards: dict[str, str]  # port on the host's 127.0.0.1 -> address in the cluster

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        raw: dict[str, Any] = json.loads(text)
        components = tuple(
            Component(**{**c, "argv": tuple(c["argv"]), "after": tuple(c["after"])}) for c in raw["components"]
        )
        return cls(components, raw["files"], raw["forwards"])


def plan(spec: Spec) -> Plan:
    """The whole cluster, or the API server alone."""
    parts = [_etcd(spec), _api_server(spec)]
    if spec.whole or spec.controllers:
        parts.append(_controller_manager(spec))
    forwards = {}
    if spec.whole:
        parts += _node(spec)
        forwards = {
            str(spec.ports.api): f"{NODE_IP}:6443",
            str(spec.ports.registry): f"127.0.0.1:{spec.ports.registry}",
            str(spec.ports.prometheus): f"{NODE_IP}:9090",
        }
    return Plan(tuple(parts), dict(_files(spec)), forwards)


def _etcd(spec: Spec) -> Component:
    client, peer = f"http://127.0.0.1:{spec.ports.etcd}", f"http://127.0.0.1:{spec.ports.etcd_peer}"
    # No fsync: a killed process loses nothing, and a machine that loses power loses a cluster for tests.
    argv = (
        *(f"{spec.programs}/etcd", "--data-dir", f"{spec.state}/etcd", "--log-level", "warn", "--unsafe-no-fsync"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"),
    )
    return Component("etcd", argv, ready_url=f"{client}/health")


def _api_server(spec: Spec) -> Component:
    pki, conf = f"{spec.state}/pki", f"{spec.state}/conf"
    argv = (
        f"{spec.programs}/kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{spec.ports.etcd}",
        f"--secure-port={spec.api_port}",
        f"--bind-address={'0.0.0.0' if spec.whole else '127.0.0.1'}",
        f"--advertise-address={spec.host}",
        *(() if spec.whole else ("--endpoint-reconciler-type=none",)),  # a loopback address is no valid endpoint
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        f"--token-auth-file={conf}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--anonymous-auth=true",  # health checks; RBAC allows nothing more
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki}/service-accounts.key",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        f"--kubelet-client-certificate={pki}/kubelet-client.crt",
        f"--kubelet-client-key={pki}/kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--audit-policy-file={conf}/audit-policy.yaml",
        f"--audit-log-path={spec.state}/log/audit.log",
        *("--audit-log-maxsize=200", "--audit-log-maxbackup=1"),
        "--allow-privileged=true",
        "--profiling=false",
    )
    return Component("kube-apiserver", argv, ("etcd",), f"https://{spec.host}:{spec.api_port}/readyz")


def _controller_manager(spec: Spec) -> Component:
    pki = f"{spec.state}/pki"
    argv = (
        f"{spec.programs}/kube-controller-manager",
        f"--kubeconfig={spec.state}/conf/controller-manager.kubeconfig",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={pki}/service-accounts.key",
        f"--root-ca-file={pki}/ca.crt",
        *("--bind-address=127.0.0.1", f"--secure-port={spec.ports.controllers}"),
        # A node that vanished (the cluster was killed) should be known within seconds of its return.
        *("--node-monitor-grace-period=30s", "--profiling=false"),
    )
    ready = f"https://127.0.0.1:{spec.ports.controllers}/healthz"
    return Component("kube-controller-manager", argv, ("kube-apiserver",), ready)


def _node(spec: Spec) -> Iterator[Component]:
    conf, programs, state = f"{spec.state}/conf", spec.programs, spec.state
    api = ("kube-apiserver",)
    yield Component(
        "kube-scheduler",
        (
            f"{programs}/kube-scheduler",
            *(f"--kubeconfig={conf}/scheduler.kubeconfig", "--leader-elect=false"),
            *("--bind-address=127.0.0.1", "--profiling=false"),
        ),
        api,
        "https://127.0.0.1:10259/healthz",
    )
    yield Component(
        "registry",
        (spec.tools["docker-registry"], "serve", f"{conf}/registry.yaml"),
        ready_url=f"http://127.0.0.1:{spec.ports.registry}/v2/",
    )
    yield Component("containerd", (spec.tools["containerd"], "--config", f"{conf}/containerd.toml"))
    ctr = (spec.tools["ctr"], "--namespace", "k8s.io")
    yield Component(
        "sandbox-image", (*ctr, "images", "import", "--digests=false", f"{state}/conf/pause.tar"), ("containerd",),
        task=True,
    )  # fmt: skip
    yield Component(
        "kubelet",
        (
            f"{programs}/kubelet",
            *(f"--kubeconfig={conf}/kubelet.kubeconfig", f"--config={conf}/kubelet.yaml"),
            *("--hostname-override=node1", f"--node-ip={NODE_IP}"),
        ),
        (*api, "sandbox-image"),
        "http://127.0.0.1:10248/healthz",
        remedy="its log usually names a cgroup or a mount; the machine must allow both to root",
    )
    yield Component(
        "kube-proxy",
        (f"{programs}/kube-proxy", "--config", f"{conf}/kube-proxy.yaml"),
        api,
        "http://127.0.0.1:10256/livez",
    )
    kubectl = (f"{programs}/kubectl", f"--kubeconfig={conf}/inside.kubeconfig")
    yield Component(
        "bootstrap",
        (*kubectl, "apply", "--server-side", "--force-conflicts", "-f", f"{conf}/bootstrap.json"),
        api,
        task=True,
    )
    yield Component(
        "coredns", (f"{programs}/coredns", "-conf", f"{conf}/Corefile"), ("bootstrap",), f"http://{NODE_IP}:8181/ready"
    )
    yield Component(
        "scrape-targets",
        (spec.tools["python3"], "-I", str(HACK / "cluster" / "targets.py"), f"{conf}/discovery.kubeconfig",
         f"{state}/targets.json"),
        ("bootstrap",),
    )  # fmt: skip
    yield Component(
        "prometheus",
        (
            f"{programs}/prometheus",
            *(f"--config.file={conf}/prometheus.yaml", f"--storage.tsdb.path={state}/prometheus"),
            *("--storage.tsdb.retention.time=2d", f"--web.listen-address={NODE_IP}:9090", "--web.enable-lifecycle"),
            "--log.level=warn",
        ),
        ("bootstrap",),
        f"http://{NODE_IP}:9090/-/ready",
    )
    yield Component(
        "node-ready",
        (*kubectl, "wait", "--for=condition=Ready", "node/node1", "--timeout=10s"),
        ("kubelet", "kube-controller-manager"),
        task=True,
        deadline_s=90.0,
        remedy="read log/kubelet.log and log/containerd.log in the state folder",
    )
    yield Component(
        "accounts-ready",  # a Pod is refused until its namespace has its service account
        (*kubectl, "get", "serviceaccount", "default", "--namespace=default"),
        ("kube-controller-manager",),
        task=True,
        remedy="read log/kube-controller-manager.log in the state folder",
    )


def _files(spec: Spec) -> Iterator[tuple[str, str]]:
    outside = f"https://127.0.0.1:{spec.ports.api}"
    inside = f"https://{spec.host}:{spec.api_port}"
    ca = f"{spec.state}/pki/ca.crt"
    yield "conf/tokens.csv", f"{spec.token},admin,admin,system:masters\n"
    yield "conf/audit-policy.yaml", configs.AUDIT_POLICY
    yield "admin.kubeconfig", configs.token_kubeconfig(spec.name, outside, ca, spec.token)
    yield "conf/inside.kubeconfig", configs.token_kubeconfig(spec.name, inside, ca, spec.token)
    for client in ("controller-manager", "scheduler", "kubelet", "kube-proxy", "discovery"):
        yield f"conf/{client}.kubeconfig", configs.client_kubeconfig(inside, spec.state / "pki", client)
    if not spec.whole:
        return
    yield "conf/registry.yaml", configs.registry(spec.registry_storage, spec.ports.registry)
    yield "conf/containerd.toml", configs.containerd(spec.state, spec.cni_folder, SANDBOX_IMAGE)
    yield "conf/net.d/10-pods.conflist", configs.cni(POD_CIDR)
    yield "conf/kubelet.yaml", configs.kubelet(spec.state, NODE_IP, spec.cgroup_root)
    yield "conf/kube-proxy.yaml", configs.kube_proxy(spec.state, POD_CIDR)
    yield "conf/Corefile", configs.corefile(spec.state, NODE_IP)
    yield "conf/prometheus.yaml", configs.prometheus(spec.state, spec.rule_files)
    yield "conf/bootstrap.json", configs.bootstrap(NODE_IP, spec.ports.registry)
    yield "conf/node-resolv.conf", f"nameserver {NODE_IP}\noptions timeout:2\n"
    yield "conf/pod-resolv.conf", ""
