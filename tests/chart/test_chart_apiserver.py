"""The life of a release against a real API server: install, rights, pod security, upgrade, uninstall."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver import ApiServer, running_apiserver
from authority_kit import authority
from chart_kit import (
    ALL_ON,
    CHART,
    REPOSITORY,
    environment,
    find_tool,
    of_kind,
    render,
    restricted_violations,
    run,
)

pytestmark = pytest.mark.apiserver

NAMESPACE = "lorapool-system"
KEYS = f"{NAMESPACE}-keys"
CRDS = ("basemodels.lorapool.dev", "loraadapters.lorapool.dev")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    assert find_tool("helm"), "helm is not built: make binaries"
    with running_apiserver(tmp_path_factory.mktemp("chart")) as running:
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
        for name in (NAMESPACE, "team-a"):
            apply(running, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        yield running


def apply(server: ApiServer, manifest: dict[str, Any]) -> None:
    server.kubectl("apply", "--validate=strict", "-f", "-", stdin=json.dumps(manifest))


def get(server: ApiServer, *what: str) -> Any:
    return json.loads(server.kubectl("get", *what, "-o", "json"))


def helm(server: ApiServer, *args: str | Path) -> str:
    result = run("helm", f"--kubeconfig={server.kubeconfig}", "--namespace", NAMESPACE, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@contextmanager
def release(server: ApiServer, chart: Path = CHART, *args: str | Path) -> Iterator[str]:
    """Installs the release for a `with` block and yields Helm's output; the CRDs are deleted afterwards."""
    try:
        yield helm(server, "install", "lorapool", chart, *args)
    finally:
        run("helm", f"--kubeconfig={server.kubeconfig}", "--namespace", NAMESPACE, "uninstall", "lorapool")
        delete_crds(server)


def delete_crds(server: ApiServer, timeout_s: float = 120.0) -> None:
    """Deletes the CRDs and waits until they are gone.

    When the API server fails to clean up a CRD, because its storage was just being created, it retries after growing
    pauses, or immediately when the CRD changes: so the CRDs are annotated now and then.
    """
    server.kubectl("delete", "crd", *CRDS, "--ignore-not-found", "--wait=false")
    ends_s, rounds = time.monotonic() + timeout_s, 0
    while left := [crd for crd in get(server, "crd")["items"] if crd["metadata"]["name"] in CRDS]:
        assert time.monotonic() < ends_s, [crd["status"]["conditions"] for crd in left]
        rounds += 1
        if rounds % 20 == 0:
            names = [crd["metadata"]["name"] for crd in left]
            kubeconfig = f"--kubeconfig={server.kubeconfig}"
            run("kubectl", kubeconfig, "annotate", "crd", *names, f"seen={rounds}", "--overwrite")  # may be gone by now
        time.sleep(0.2)


def example(kind: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((REPOSITORY / "examples" / f"{kind}.yaml").read_text())
    manifest["metadata"]["namespace"] = NAMESPACE
    return manifest


def older_chart(folder: Path) -> Path:
    """This chart with CRDs that lack `spec.suspend`, as an older version."""
    chart = folder / "older"
    shutil.copytree(CHART, chart)
    file = chart / "files" / "crds" / "lorapool.dev_loraadapters.yaml"
    crd = yaml.safe_load(file.read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    del schema["properties"]["spec"]["properties"]["suspend"]
    file.write_text(yaml.safe_dump(crd))
    return chart


def test_an_upgrade_brings_the_newer_crd_and_keeps_the_token_and_an_uninstall_keeps_the_objects(
    server: ApiServer, tmp_path: Path
) -> None:
    with release(server, older_chart(tmp_path)):
        apply(server, example("basemodel"))
        apply(server, example("loraadapter"))
        before = get(server, "loraadapter", "support-routing", "-n", NAMESPACE)
        assert "suspend" not in before["spec"]
        token = get(server, "secret", "lorapool-runtime-token", "-n", NAMESPACE)["data"]["token"]
        authority_before = get(server, "secret", "lorapool-internal-ca", "-n", NAMESPACE)["data"]

        helm(server, "upgrade", "lorapool", CHART)

        server.kubectl(
            "patch", "lora", "support-routing", "-n", NAMESPACE, "--type=merge", "-p", '{"spec":{"suspend":true}}'
        )
        after = get(server, "loraadapter", "support-routing", "-n", NAMESPACE)
        assert after["spec"]["suspend"] is True, "the upgraded CRD knows the field"
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        assert get(server, "secret", "lorapool-runtime-token", "-n", NAMESPACE)["data"]["token"] == token
        assert len(bytes.fromhex(base64.b64decode(token).decode())) == 32
        assert get(server, "secret", "lorapool-internal-ca", "-n", NAMESPACE)["data"] == authority_before

        helm(server, "upgrade", "lorapool", CHART, "--set", "internalTLS.enabled=false")
        assert get(server, "secret", "lorapool-internal-ca", "-n", NAMESPACE)["data"] == authority_before

        helm(server, "uninstall", "lorapool")

        assert (
            get(
                server,
                "deployments,secrets,networkpolicies",
                "-n",
                NAMESPACE,
                "-l",
                "app.kubernetes.io/instance=lorapool",
            )["items"]
            == []
        )
        assert len(get(server, "bm,lora", "-n", NAMESPACE)["items"]) == 2
        server.kubectl("delete", "bm,lora", "--all", "-n", NAMESPACE, "--timeout=20s")
        delete_crds(server)


def test_a_second_install_takes_over_the_crds_that_an_uninstall_left(server: ApiServer) -> None:
    with release(server):
        helm(server, "uninstall", "lorapool")

        helm(server, "install", "lorapool", CHART)


def test_an_install_in_a_restricted_namespace_warns_of_nothing(server: ApiServer) -> None:
    with release(server) as printed:
        assert "violate PodSecurity" not in printed
        assert "warning" not in printed.lower().partition("notes:")[0]
        for name in ("operator", "gateway"):
            spec = get(server, "deployment", f"lorapool-{name}", "-n", NAMESPACE)["spec"]["template"]
            pod = {"apiVersion": "v1", "kind": "Pod", **spec, "metadata": {"name": "p", "namespace": NAMESPACE}}
            server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))


def test_the_notes_stop_warning_once_there_is_a_base(server: ApiServer) -> None:
    with release(server) as printed:
        assert "WARNING: there is no BaseModel yet" in printed
        apply(server, example("basemodel"))

        assert "no BaseModel" not in helm(server, "upgrade", "lorapool", CHART)


ALLOWED = {
    "operator": [
        "list basemodels.lorapool.dev",
        "watch loraadapters.lorapool.dev",
        "patch loraadapters.lorapool.dev/status",
        "patch basemodels.lorapool.dev/scale",
        "create deployments.apps",
        "patch services",
        "delete poddisruptionbudgets.policy",
        "watch pods",
        "watch replicasets.apps",
        "watch statefulsets.apps",
        "watch leaderworkersets.leaderworkerset.x-k8s.io",
        "patch leaderworkersets.leaderworkerset.x-k8s.io",
        "create events",
        "create leases.coordination.k8s.io",
        "update leases.coordination.k8s.io/lorapool-operator",
        "get secrets/lorapool-runtime-tls",
        "patch secrets/lorapool-runtime-tls",
    ],
    "gateway": [
        "list basemodels.lorapool.dev",
        "watch loraadapters.lorapool.dev",
        "patch basemodels.lorapool.dev/scale",
        "watch pods",
        "watch replicasets.apps",
        "watch leaderworkersets.leaderworkerset.x-k8s.io",
    ],
}
DENIED = {
    "operator": [
        "get secrets",
        "list secrets",
        "create secrets",
        "get secrets/lorapool-runtime-token",
        "get secrets/lorapool-internal-ca",
        "patch loraadapters.lorapool.dev",
        "delete basemodels.lorapool.dev",
        "update leases.coordination.k8s.io/other",
        "create statefulsets.apps",
        "create pods",
        "create pods/exec",
        "create roles.rbac.authorization.k8s.io",
        "create serviceaccounts/token",
    ],
    "gateway": [
        "get secrets",
        "list secrets",
        "patch loraadapters.lorapool.dev/status",
        "create deployments.apps",
        "get pods",
        "create pods/exec",
    ],
}


def may(server: ApiServer, component: str, right: str, namespace: str) -> bool:
    """Whether the API server's authorizer allows a request of the component's service account."""
    verb, _, what = right.partition(" ")
    resource, _, rest = what.partition("/")
    name, group = resource.partition(".")[::2]
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": name}
    if rest:
        attributes["name" if resource.startswith(("leases", "secrets")) else "subresource"] = rest
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{NAMESPACE}:lorapool-{component}",
            "groups": ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"],
            "resourceAttributes": attributes,
        },
    }
    request = urllib.request.Request(
        f"{server.url}/apis/authorization.k8s.io/v1/subjectaccessreviews",
        data=json.dumps(review).encode(),
        headers={"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"},
    )
    trust = ssl.create_default_context(cafile=str(server.ca_file))
    with urllib.request.urlopen(request, context=trust, timeout=20) as response:
        return bool(json.load(response)["status"]["allowed"])


def test_the_authorizer_grants_what_is_needed_and_nothing_beyond(server: ApiServer) -> None:
    with release(server):
        for component, rights in ALLOWED.items():
            for right in rights:
                assert may(server, component, right, NAMESPACE), f"{component} may not {right}"
                assert not may(server, component, right, "team-a"), f"{component} may {right} in another namespace"
        for component, rights in DENIED.items():
            for right in rights:
                assert not may(server, component, right, NAMESPACE), f"{component} may {right}"
        assert may(server, "gateway", "list secrets", KEYS)
        assert not may(server, "operator", "get secrets", KEYS)


def kubeconfig_of(server: ApiServer, component: str, folder: Path) -> Path:
    """A kubeconfig with the token of the component's service account, as its pod has it."""
    token = server.kubectl("create", "token", f"lorapool-{component}", "-n", NAMESPACE).strip()
    cluster = {"server": server.url, "certificate-authority": str(server.ca_file)}
    file = folder / f"{component}.kubeconfig"
    file.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
                "current-context": "x",
            }
        )
    )
    return file


@contextmanager
def process(component: str, kubeconfig: Path, env: dict[str, str], log: Path) -> Iterator[None]:
    """Runs the real program with the pod's environment but outside a pod; ends it with SIGTERM."""
    prefix = f"LORAPOOL_{component.upper()}_"
    own = {f"{prefix}KUBECONFIG": str(kubeconfig), f"{prefix}METRICS_PORT": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("LORAPOOL_", "KUBE"))}
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", f"lorapool_{component}"],
            env={**outside, **env, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
            assert child.poll() is None, log.read_text()
        finally:
            child.terminate()
            child.wait(30)


def refused(server: ApiServer) -> list[str]:
    """Requests of the chart's service accounts that the server denied, from its audit log."""
    found = []
    for line in server.audit_log.read_text().splitlines():
        event = json.loads(line)
        user = event.get("user", {}).get("username", "")
        if (
            user.startswith(f"system:serviceaccount:{NAMESPACE}:")
            and event.get("responseStatus", {}).get("code") == 403
        ):
            found.append(f"{user}: {event['verb']} {event['requestURI']}")
    return found


def eventually(what: str, check: Callable[[], bool], log: Path, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline_s, f"{what}\n{log.read_text()[-4000:]}"
        time.sleep(0.3)


def test_operator_gateway_and_ledger_do_their_work_under_the_charts_rights(server: ApiServer, tmp_path: Path) -> None:
    token, profiles = tmp_path / "token", tmp_path / "profiles.yaml"
    manifests = render(namespace=NAMESPACE)
    mounted = of_kind(manifests, "ConfigMap")["lorapool-runtime-profiles"]["data"]
    profiles.write_text(mounted["profiles.yaml"])
    policy = tmp_path / "source-policy.yaml"
    policy.write_text(mounted["source-policy.yaml"])
    quotas = tmp_path / "quotas.json"
    quotas.write_text(of_kind(manifests, "ConfigMap")["lorapool-quotas"]["data"]["quotas.json"])
    operator_log, gateway_log, ledger_log = (tmp_path / f"{name}.log" for name in ("operator", "gateway", "ledger"))

    with release(server):
        token.write_text("0" * 64)
        authority(tmp_path / "internal-ca")
        operator = environment(manifests, "operator") | {
            "LORAPOOL_OPERATOR_MASTER_TOKEN_FILE": str(token),
            "LORAPOOL_OPERATOR_PROFILES_FILE": str(profiles),
            "LORAPOOL_OPERATOR_SOURCE_POLICY_FILE": str(policy),
            "LORAPOOL_OPERATOR_INTERNAL_CA_DIR": str(tmp_path / "internal-ca"),
            "LORAPOOL_OPERATOR_LOG_FORMAT": "text",
            "LORAPOOL_OPERATOR_RESYNC_S": "1",
            "HOME": str(tmp_path),
            "HF_HOME": str(tmp_path),
        }
        gateway = environment(manifests, "gateway") | {
            "LORAPOOL_GATEWAY_MASTER_TOKEN_FILE": str(token),
            "LORAPOOL_GATEWAY_API_PORT": "0",
            "LORAPOOL_GATEWAY_SHUTDOWN_DELAY_S": "0",
            "LORAPOOL_GATEWAY_LEDGER_TOKEN_FILE": str(token),
            "LORAPOOL_GATEWAY_JOURNAL_DIR": str(tmp_path),
            "LORAPOOL_GATEWAY_QUOTA_FILE": str(quotas),
        }
        ledger = environment(manifests, "ledger") | {
            "LORAPOOL_LEDGER_DATABASE_URL": f"sqlite:///{tmp_path}/ledger.db",
            "LORAPOOL_LEDGER_TOKEN_FILE": str(token),
            "LORAPOOL_LEDGER_MASTER_TOKEN_FILE": str(token),
            "LORAPOOL_LEDGER_API_PORT": "0",
        }
        del ledger["LORAPOOL_LEDGER_TLS_DIR"]
        with (
            process("operator", kubeconfig_of(server, "operator", tmp_path), operator, operator_log),
            process("gateway", kubeconfig_of(server, "gateway", tmp_path), gateway, gateway_log),
            process("ledger", kubeconfig_of(server, "ledger", tmp_path), ledger, ledger_log),
        ):
            apply(server, example("basemodel"))
            apply(server, example("loraadapter"))

            def checked() -> bool:
                items = get(server, "bm,lora", "-n", NAMESPACE)["items"]
                return all(item.get("status", {}).get("conditions") for item in items)

            eventually("no object was checked", checked, operator_log)
            server.kubectl("scale", "bm/smollm2", "-n", NAMESPACE, "--replicas=1")
            ours = (
                "deployments,services,poddisruptionbudgets",
                "-n",
                NAMESPACE,
                "-l",
                "app.kubernetes.io/instance=smollm2",
            )

            def made() -> bool:
                return {item["kind"] for item in get(server, *ours)["items"]} == {
                    "Deployment",
                    "Service",
                    "PodDisruptionBudget",
                }

            eventually("no children were made", made, operator_log)
            runtime = get(server, "deployment/smollm2-runtime", "-n", NAMESPACE)["spec"]["template"]
            certificates = get(server, "secret/lorapool-runtime-tls", "-n", NAMESPACE)["data"]
            server.kubectl("delete", "bm,lora", "--all", "-n", NAMESPACE, "--timeout=30s")
            time.sleep(2.5)  # two resyncs

        assert refused(server) == []
        [items] = [item["secret"]["items"] for item in runtime["spec"]["volumes"] if item["name"] == "runtime-tls"]
        assert {item["key"] for item in items} == set(certificates)
        assert "Traceback" not in operator_log.read_text() + gateway_log.read_text() + ledger_log.read_text()
        assert restricted_violations(runtime["spec"]) == [], "runtime pods are held to the same standard"
        assert runtime["metadata"]["labels"]["lorapool.dev/base"] == "smollm2", "network policies select by it"


def test_cluster_mode_reaches_every_namespace_but_lists_no_secret_there(server: ApiServer) -> None:
    with release(server, CHART, "--set", "scope=cluster"):
        assert may(server, "operator", "create deployments.apps", "team-a")
        assert may(server, "gateway", "patch basemodels.lorapool.dev/scale", "team-a")
        assert may(server, "gateway", "list secrets", KEYS)
        assert not may(server, "gateway", "list secrets", NAMESPACE)
        assert not may(server, "gateway", "list secrets", "team-a")
        assert not may(server, "operator", "list secrets", "team-a")


def test_watched_namespaces_get_their_roles(server: ApiServer) -> None:
    with release(server, CHART, "--set", f"watchNamespaces={{{NAMESPACE},team-a}}"):
        assert may(server, "operator", "create deployments.apps", "team-a")
        assert not may(server, "operator", "create deployments.apps", "default")
        assert may(server, "operator", "create networkpolicies.networking.k8s.io", "team-a")


def test_the_server_accepts_every_object_with_everything_switched_on(server: ApiServer, tmp_path: Path) -> None:
    # Kinds of other projects are unknown to this server.
    foreign = {"httpRoute": {"enabled": False}, "metrics": {"dashboards": {"enabled": True}}}
    values = {**ALL_ON, **foreign, "watchNamespaces": [NAMESPACE, "team-a"], "apiKeys": {"namespace": "team-a"}}
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))

    with release(server, CHART, "--values", file) as printed:
        assert "STATUS: deployed" in printed


def test_the_example_key_is_an_ordinary_secret(server: ApiServer) -> None:
    server.kubectl("apply", "--dry-run=server", "-n", NAMESPACE, "-f", str(REPOSITORY / "examples" / "apikey.yaml"))
