"""The local cluster: two at once, DNS names, nothing left behind, restart after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from local_cluster import Cluster, cluster, command_lines, network_namespaces, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a kubelet and containers need root"),
]

IMAGE = "lorapool.local/pause:1"  # the node's own image; it can also serve and fetch


@dataclass(frozen=True)
class Host:
    """Everything that a cluster could leave behind."""

    links: frozenset[str]
    mounts: frozenset[str]
    rules: str

    @classmethod
    def now(cls) -> "Host":
        links = {link["ifname"] for link in json.loads(_run("ip", "-json", "link"))}
        mounts = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()}
        rules = _run("iptables-save") + _run("ip", "rule") + _run("ip", "route")
        rules = re.sub(r"^#.*$|\[\d+:\d+\]", "", rules, flags=re.MULTILINE)  # dates and packet counts
        return cls(frozenset(links), frozenset(mounts), rules)


def _run(*command: str) -> str:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30, env=dict(os.environ, PATH=path)
    ).stdout


@pytest.fixture(scope="module", autouse=True)
def host_before() -> Host:
    cluster("build")
    return Host.now()


@pytest.fixture(scope="module")
def two(host_before: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Cluster]]:
    root = tmp_path_factory.mktemp("clusters")
    started = []
    try:
        for name in ("one", "two"):
            started.append(Cluster.up(name, root / name))
        yield started
    finally:
        for name in ("one", "two"):
            cluster("down", "--state", str(root / name), "--purge")


SERVER = """
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  labels: {{app: echo}}
  annotations: {{prometheus.io/scrape: "true", prometheus.io/port: "8080"}}
spec:
  securityContext: {{runAsNonRoot: true, seccompProfile: {{type: RuntimeDefault}}}}
  containers:
  - name: echo
    image: {image}
    command: [/pause, serve, ":8080"]
    readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}
    securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}, readOnlyRootFilesystem: true}}
---
apiVersion: v1
kind: Service
metadata: {{name: echo}}
spec: {{selector: {{app: echo}}, ports: [{{port: 80, targetPort: 8080}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: asker}}
spec:
  restartPolicy: Never
  securityContext: {{runAsNonRoot: true, seccompProfile: {{type: RuntimeDefault}}}}
  containers:
  - name: asker
    image: {image}
    command: [/pause, fetch, "http://echo.default.svc.cluster.local/"]
    securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}, readOnlyRootFilesystem: true}}
"""


def test_in_two_clusters_at_once_a_pod_finds_its_own_clusters_service_by_name(two: list[Cluster]) -> None:
    for number, each in enumerate(two):
        each.kubectl("label", "namespace", "default", "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
        each.kubectl("apply", "-f", "-", stdin=SERVER.format(name=f"echo-of-{number}", image=IMAGE))
    for number, each in enumerate(two):
        each.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/asker", "--timeout=90s")
        answer = each.kubectl("logs", "asker").splitlines()[-1]  # before it, the tries until the server was ready
        assert answer == f"echo-of-{number}"


def test_a_service_is_reached_from_the_host_by_a_forward(two: list[Cluster]) -> None:
    for number, each in enumerate(two):
        target = "echo.default.svc.cluster.local:80"
        address = cluster("forward", "--state", str(each.state), "--to", target).strip()
        assert _get(f"http://{address}/").strip() == f"echo-of-{number}"


def test_prometheus_scrapes_a_pod_that_asks_for_it(two: list[Cluster]) -> None:
    for number, each in enumerate(two):

        def scraped(url: str = each.prometheus_url, pod: str = f"echo-of-{number}") -> bool:
            answer = json.loads(_get(f"{url}/api/v1/query?query=pause_up"))
            return [r["metric"]["pod"] for r in answer["data"]["result"]] == [pod]

        wait_until(scraped, timeout_s=30, what="the pod's series in Prometheus")


def test_a_pod_that_breaks_the_restricted_standard_is_refused(two: list[Cluster]) -> None:
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        two[0].kubectl("run", "root", f"--image={IMAGE}")


def test_exec_logs_and_port_forward_reach_the_kubelet(two: list[Cluster]) -> None:
    answer = two[0].kubectl("exec", "echo-of-0", "--", "/pause", "fetch", "http://127.0.0.1:8080/", "1")
    assert answer.strip() == "echo-of-0"


def test_every_mutation_is_in_the_audit_log(two: list[Cluster]) -> None:
    events = [json.loads(line) for line in (two[0].state / "log" / "audit.log").read_text().splitlines()]
    assert any(e["verb"] == "create" and e.get("objectRef", {}).get("name") == "root" for e in events)


def test_up_works_after_every_process_was_killed_and_keeps_the_objects(two: list[Cluster]) -> None:
    first, second = two
    os.kill(first.process(), signal.SIGKILL)
    wait_until(lambda: first.process() not in command_lines(), timeout_s=20, what="the cluster to die")
    again = Cluster.up("one", first.state)
    assert again == first  # the same ports and credentials
    wait_until(lambda: _phase(again, "echo-of-0") == "Running true", timeout_s=90, what="the pod to run again")
    assert _phase(second, "echo-of-1") == "Running true"


def _phase(each: Cluster, pod: str) -> str:
    return each.kubectl("get", "pod", pod, "-o=jsonpath={.status.phase} {.status.containerStatuses[0].ready}")


def test_after_down_nothing_is_left_on_the_host(two: list[Cluster], host_before: Host) -> None:
    namespaces = {str(Path(f"/proc/{each.process()}/ns/net").readlink()) for each in two}
    cgroups = {json.loads((each.state / "spec.json").read_text())["cgroup_root"].strip("/") for each in two}
    assert len(namespaces) == len(cgroups) == 2
    assert namespaces <= network_namespaces()
    assert cgroups <= _cgroups()
    for each in two:
        cluster("down", "--state", str(each.state), "--purge")
    assert not any(str(each.state) in line for line in command_lines().values() for each in two)
    assert not namespaces & network_namespaces()
    assert not cgroups & _cgroups()
    after = Host.now()
    assert after.links == host_before.links
    assert after.mounts <= host_before.mounts
    assert after.rules == host_before.rules
    assert not any(each.state.exists() for each in two)


def _cgroups() -> set[str]:
    return {p.name for p in Path("/sys/fs/cgroup").glob("**/lorapool-*")}


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())
