"""The text of every configuration file. Pure."""

import json
from collections.abc import Sequence
from pathlib import Path

AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, nonResourceURLs: ["/healthz*", "/readyz*", "/livez*"]}
- {level: Metadata}
"""


def token_kubeconfig(name: str, server: str, ca_file: str, token: str) -> str:
    """A kubeconfig whose user has a bearer token."""
    return _kubeconfig(name, server, ca_file, {"token": token})


def client_kubeconfig(server: str, pki: Path, client: str) -> str:
    """A kubeconfig whose user has a client certificate."""
    user = {"client-certificate": f"{pki}/{client}.crt", "client-key": f"{pki}/{client}.key"}
    return _kubeconfig("local", server, f"{pki}/ca.crt", user)


def _kubeconfig(name: str, server: str, ca_file: str, user: dict[str, str]) -> str:
    cluster = {"server": server, "certificate-authority": ca_file}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    return json.dumps(config, indent=1)  # YAML enough for every reader


def registry(storage: Path, port: int, host: str = "0.0.0.0") -> str:
    """The blobs are stored in the shared cache: an image pushed to one cluster need not be pushed to the next."""
    return f"""\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: "{storage}"}}, delete: {{enabled: true}}}}
http: {{addr: "{host}:{port}"}}
"""


def containerd(state: Path, cni_folder: str, sandbox_image: str) -> str:
    """A layer is removed from the content store once it is unpacked: the registry still has it."""
    return f"""\
version = 2
root = "{state}/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  # Without CAP_SYS_RESOURCE runc dies lowering a sandbox's score: "can't get final child's PID from pipe".
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_folder}"
    conf_dir = "{state}/conf/net.d"
"""


def cni(pod_cidr: str) -> str:
    """One bridge; addresses are allocated from files that disappear with the cluster."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isDefaultGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": pod_cidr}]], "dataDir": "/run/cni-addresses"},
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, portmap]}, indent=1)


def kubelet(state: Path, node_ip: str, cgroup_root: str) -> str:
    """Evicts no pod and removes no image because the disk is nearly full: it is the developer's disk."""
    return f"""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {node_ip}
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: false}}
  x509: {{clientCAFile: {state}/pki/ca.crt}}
authorization: {{mode: AlwaysAllow}}
cgroupDriver: cgroupfs
cgroupRoot: {cgroup_root}
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: [{node_ip}]
clusterDomain: cluster.local
resolvConf: {state}/conf/pod-resolv.conf
imageGCHighThresholdPercent: 100
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}}
nodeStatusUpdateFrequency: 5s
syncFrequency: 20s
maxPods: 110
registryPullQPS: 0
eventRecordQPS: 50
shutdownGracePeriod: 0s
"""


def kube_proxy(state: Path, pod_cidr: str) -> str:
    return f"""\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {{kubeconfig: {state}/conf/kube-proxy.kubeconfig}}
clusterCIDR: {pod_cidr}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
hostnameOverride: node1
iptables: {{minSyncPeriod: 100ms}}
"""


def corefile(state: Path, node_ip: str) -> str:
    """Resolves names of the cluster. Any other name is answered NXDOMAIN at once: no packet leaves the machine."""
    return f"""\
cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {{
  bind {node_ip}
  errors
  ready {node_ip}:8181
  kubernetes {{
    kubeconfig {state}/conf/discovery.kubeconfig
    pods insecure
    ttl 5
  }}
}}
.:53 {{
  bind {node_ip}
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""


def prometheus(state: Path, rule_files: Sequence[str]) -> str:
    """Scrapes the pods that `targets` lists."""
    rules = [f"{state}/rules/*.yml", f"{state}/rules/*.yaml", *rule_files]
    scrape = {"job_name": "pods", "file_sd_configs": [{"files": [f"{state}/targets.json"]}]}
    settings = {"scrape_interval": "5s", "scrape_timeout": "4s", "evaluation_interval": "5s"}
    return json.dumps({"global": settings, "rule_files": rules, "scrape_configs": [scrape]}, indent=1)


def bootstrap(node_ip: str, registry_port: int) -> str:
    """The first objects of a cluster: the discovery role, and the registry under a name that pods can resolve."""
    rbac = "rbac.authorization.k8s.io"
    labels = {"app.kubernetes.io/managed-by": "local-cluster"}
    resources = ["pods", "services", "endpoints", "namespaces", "nodes"]
    verbs = ["get", "list", "watch"]
    items = [
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "local-cluster:discovery", "labels": labels},
            "rules": [
                {"apiGroups": [""], "resources": resources, "verbs": verbs},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs},
            ],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "local-cluster:discovery", "labels": labels},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "local-cluster:discovery"},
            "subjects": [{"apiGroup": rbac, "kind": "User", "name": "local-cluster:discovery"}],
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "registry", "namespace": "kube-system", "labels": labels},
            "spec": {"ports": [{"name": "http", "port": 5000, "targetPort": registry_port, "protocol": "TCP"}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "registry-node",
                "namespace": "kube-system",
                "labels": labels | {"kubernetes.io/service-name": "registry"},
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": [node_ip], "conditions": {"ready": True}}],
            "ports": [{"name": "http", "port": registry_port, "protocol": "TCP"}],
        },
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1)
