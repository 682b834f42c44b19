"""Pod security, permissions, secrets and network policies of the rendered objects."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from base_world import base
from chart_kit import NAMESPACE, Manifest, environment, grants, of_kind, pod_of, refusal, render, restricted_violations
from profile_kit import two_nodes

from lorapool_operator.decisions.manifests import network_policy
from lorapool_operator.effects.authority import Authority
from lorapool_operator.world.profiles import parse_profiles

GOLDEN = Path(__file__).parent / "golden_rbac.json"
NAMESPACED: dict[str, Any] = {"watchNamespaces": ["team-a", "team-b"], "apiKeys": {"namespace": "lorapool-keys"}}
CLUSTER: dict[str, Any] = {"scope": "cluster", "apiKeys": {"namespace": "lorapool-keys"}}


def test_the_rights_are_exactly_the_golden_ones() -> None:
    # To accept a change: write `actual` into golden_rbac.json and say in the commit why the right is needed.
    actual = {"namespaced": grants(render(NAMESPACED)), "cluster": grants(render(CLUSTER))}

    assert actual == json.loads(GOLDEN.read_text()), json.dumps(actual, indent=2)


def test_events_are_only_listed_where_a_profile_has_groups_of_nodes() -> None:
    groups = {"runtimeProfiles": {"fleet": two_nodes()}}
    [operator] = [rights for name, rights in grants(render({**NAMESPACED, **groups})).items() if "operator" in name]
    assert "in team-a: create events" in operator
    assert "in team-a: list events" in operator


@pytest.mark.parametrize("values", [NAMESPACED, CLUSTER], ids=["namespaced", "cluster"])
def test_no_right_is_a_wildcard_or_an_escalation(values: dict[str, Any]) -> None:
    for manifest in render(values):
        for rule in manifest.get("rules", []) if manifest["kind"] in {"Role", "ClusterRole"} else []:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
            assert not any(r.startswith(("pods/", "roles", "serviceaccounts")) for r in rule["resources"])


@pytest.mark.parametrize("values", [NAMESPACED, CLUSTER], ids=["namespaced", "cluster"])
def test_the_gateway_reads_secrets_where_the_keys_are_and_the_operator_only_by_name(values: dict[str, Any]) -> None:
    secrets = {name: [line for line in lines if " secrets" in line] for name, lines in grants(render(values)).items()}

    assert {line.partition(": ")[2] for line in secrets["lorapool-operator"]} == {
        "get secrets named lorapool-source-credentials",
        "get create patch delete secrets named lorapool-runtime-tls",
        "get create patch secrets named lorapool-ledger-tls",
    }
    assert secrets["lorapool-gateway"] == secrets["lorapool-ledger"] == ["in lorapool-keys: list watch secrets"]


def test_namespaced_mode_grants_nothing_across_the_cluster() -> None:
    manifests = render(NAMESPACED)

    assert not of_kind(manifests, "ClusterRoleBinding")
    for role in of_kind(manifests, "ClusterRole").values():
        assert any(label.startswith("rbac.authorization.k8s.io/aggregate-to-") for label in role["metadata"]["labels"])


def test_view_reads_and_edit_writes_the_objects() -> None:
    roles = of_kind(render(), "ClusterRole")
    view, edit = roles[f"{NAMESPACE}-lorapool-view"], roles[f"{NAMESPACE}-lorapool-edit"]

    assert {verb for rule in view["rules"] for verb in rule["verbs"]} == {"get", "list", "watch"}
    assert "rbac.authorization.k8s.io/aggregate-to-view" not in edit["metadata"]["labels"]
    assert not any("status" in resource for rule in edit["rules"] for resource in rule["resources"])


@pytest.mark.parametrize("values", [{}, CLUSTER, {"test": {"apiKeySecret": {"name": "key"}}}])
def test_every_pod_passes_pod_security_restricted(values: dict[str, Any]) -> None:
    pods = {m["metadata"]["name"]: pod for m in render(values) if (pod := pod_of(m))}

    assert set(pods) == {"lorapool-operator", "lorapool-gateway", "lorapool-ledger", "lorapool-test"}
    for name, pod in pods.items():
        assert restricted_violations(pod["spec"]) == [], name


def test_the_check_of_pod_security_finds_violations() -> None:
    found = restricted_violations(
        {
            "hostNetwork": True,
            "volumes": [{"name": "root", "hostPath": {"path": "/"}}],
            "containers": [{"name": "c", "securityContext": {"privileged": True}, "ports": [{"hostPort": 80}]}],
        }
    )

    assert len(found) == 11


def test_only_processes_that_call_the_api_server_get_a_token() -> None:
    manifests = render()
    for account in of_kind(manifests, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    mounted = {m["metadata"]["name"]: p["spec"]["automountServiceAccountToken"] for m in manifests if (p := pod_of(m))}
    called = dict.fromkeys(("lorapool-operator", "lorapool-gateway", "lorapool-ledger"), True)
    assert mounted == {**called, "lorapool-test": False}


def test_the_master_token_has_256_random_bits_and_stands_nowhere_else() -> None:
    tokens = set()
    for nonce in range(2):
        manifests = render(nonce=nonce)
        secret = of_kind(manifests, "Secret")["lorapool-runtime-token"]
        token = base64.b64decode(secret["data"]["token"]).decode()
        assert len(bytes.fromhex(token)) == 32
        rest = json.dumps([manifest for manifest in manifests if manifest["kind"] != "Secret"])
        assert token not in rest
        assert secret["data"]["token"] not in rest
        tokens.add(token)
    assert len(tokens) == 2


def test_a_secret_of_ones_own_replaces_the_made_one() -> None:
    manifests = render({"runtimeToken": {"existingSecret": "mine", "key": "master"}})

    assert "lorapool-runtime-token" not in of_kind(manifests, "Secret")
    for name in ("lorapool-operator", "lorapool-gateway", "lorapool-ledger"):
        volume = secret_volume(manifests, name, "runtime-token")
        assert volume["secretName"] == "mine"
        assert volume["items"] == [{"key": "master", "path": "token"}]


def secret_volume(manifests: list[Manifest], deployment: str, name: str) -> dict[str, Any]:
    pod = pod_of(of_kind(manifests, "Deployment")[deployment])
    assert pod is not None
    [volume] = [item["secret"] for item in pod["spec"]["volumes"] if item["name"] == name]
    return dict(volume)


def test_the_internal_authority_is_made_with_its_key_for_the_operator_alone(tmp_path: Path) -> None:
    manifests = render()
    secret = of_kind(manifests, "Secret")["lorapool-internal-ca"]
    assert secret["type"] == "kubernetes.io/tls"
    files = {name: base64.b64decode(value) for name, value in secret["data"].items()}
    assert files["ca.crt"] == files["tls.crt"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert Authority(tmp_path).issuer().between == b""
    mounted = {
        name: [item["key"] for item in secret_volume(manifests, f"lorapool-{name}", "internal-ca")["items"]]
        for name in ("operator", "gateway", "ledger")
    }
    assert mounted == {"operator": ["ca.crt", "tls.crt", "tls.key"], "gateway": ["ca.crt"], "ledger": ["ca.crt"]}
    rest = json.dumps([manifest for manifest in manifests if manifest["kind"] != "Secret"])
    assert secret["data"]["tls.key"] not in rest
    assert environment(manifests, "operator")["LORAPOOL_OPERATOR_INTERNAL_TLS"] == "true"


def test_without_internal_tls_no_authority_is_made_and_no_right_on_its_secrets_is_given() -> None:
    manifests = render({"internalTLS": {"enabled": False}})
    assert set(of_kind(manifests, "Secret")) == {"lorapool-runtime-token", "lorapool-ledger-token"}
    assert not any("lorapool-runtime-tls" in line for lines in grants(manifests).values() for line in lines)
    assert environment(manifests, "operator")["LORAPOOL_OPERATOR_INTERNAL_TLS"] == "false"
    for name in ("operator", "gateway"):  # pods that still serve TLS are checked until they are replaced
        volume = secret_volume(manifests, f"lorapool-{name}", "internal-ca")
        assert (volume["optional"], volume["items"]) == (True, [{"key": "ca.crt", "path": "ca.crt"}])


def test_an_authority_of_ones_own_or_of_cert_manager_replaces_the_made_one() -> None:
    own = render({"internalTLS": {"existingSecret": "mine"}})
    issued = render({"internalTLS": {"certManager": {"issuerRef": {"name": "root", "kind": "ClusterIssuer"}}}})
    for manifests, name in ((own, "mine"), (issued, "lorapool-internal-ca-issued")):
        assert "lorapool-internal-ca" not in of_kind(manifests, "Secret")
        for component in ("operator", "gateway"):
            volume = secret_volume(manifests, f"lorapool-{component}", "internal-ca")
            assert (volume["secretName"], volume["optional"]) == (name, False)
    [certificate] = of_kind(issued, "Certificate").values()
    spec = certificate["spec"]
    assert (spec["isCA"], spec["secretName"]) == (True, "lorapool-internal-ca-issued")
    assert spec["issuerRef"] == {"name": "root", "kind": "ClusterIssuer"}
    assert spec["privateKey"]["rotationPolicy"] == "Never"
    both = {"existingSecret": "mine", "certManager": {"issuerRef": {"name": "root"}}}
    assert "set only one of them" in refusal({"internalTLS": both})


def test_credentials_are_only_ever_references() -> None:
    manifests = render({"artifacts": {"credentials": {"existingSecret": "hub", "keys": ["HF_TOKEN"]}}})
    profiles = of_kind(manifests, "ConfigMap")["lorapool-runtime-profiles"]["data"]["profiles.yaml"]
    operator = pod_of(of_kind(manifests, "Deployment")["lorapool-operator"])
    gateway = pod_of(of_kind(manifests, "Deployment")["lorapool-gateway"])
    assert operator is not None
    assert gateway is not None
    reference = {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN", "optional": True}},
    }

    assert reference in operator["spec"]["containers"][0]["env"]
    assert "secretKeyRef" in profiles
    assert "HF_TOKEN" not in json.dumps(gateway), "the gateway fetches nothing"


# --- networks ----------------------------------------------------------------------------


def test_every_pod_of_the_release_starts_from_default_deny() -> None:
    manifests = render()
    deny = of_kind(manifests, "NetworkPolicy")["lorapool-default-deny"]["spec"]

    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    assert "egress" not in deny
    for manifest in manifests:
        if pod := pod_of(manifest):
            assert deny["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_each_component_is_selected_by_its_own_policy() -> None:
    manifests = render()
    policies = of_kind(manifests, "NetworkPolicy")
    for component in ("operator", "gateway", "ledger", "test"):
        selector = policies[f"lorapool-{component}"]["spec"]["podSelector"]["matchLabels"]
        chosen = [
            m["metadata"]["name"]
            for m in manifests
            if (p := pod_of(m)) and selector.items() <= p["metadata"]["labels"].items()
        ]
        assert chosen == [f"lorapool-{component}"]


def runtime_policy(values: dict[str, Any], profile: str = "default") -> dict[str, Any]:
    """The NetworkPolicy that the operator makes for a base of this profile, in whatever namespace."""
    text = of_kind(render(values), "ConfigMap")["lorapool-runtime-profiles"]["data"]["profiles.yaml"]
    [policy] = network_policy(base(), parse_profiles(text, origin="chart")[profile])
    return policy


@pytest.mark.parametrize("values", [NAMESPACED, CLUSTER], ids=["namespaced", "cluster"])
def test_runtimes_of_every_namespace_are_reached_by_gateway_operator_and_prometheus_only(
    values: dict[str, Any],
) -> None:
    policy = runtime_policy(values)
    spec = policy["spec"]
    assert policy["metadata"]["namespace"] == "team"
    assert spec["podSelector"]["matchLabels"]["lorapool.dev/base"] == "tiny"
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    [inference, metrics] = spec["ingress"]
    assert [port["port"] for port in inference["ports"]] == [8000]
    assert [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in inference["from"]] == [
        "gateway",
        "operator",
        "ledger",
    ]
    for peer in inference["from"]:
        assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": NAMESPACE}
    assert [port["port"] for port in metrics["ports"]] == [9090]
    assert not [item for item in of_kind(render(values), "NetworkPolicy") if "runtimes" in item]


def test_metrics_are_for_prometheus_alone() -> None:
    policies = of_kind(render(), "NetworkPolicy")
    rules = [rule for item in policies.values() for rule in item["spec"].get("ingress", [])]
    scraping = [rule for rule in rules if {"protocol": "TCP", "port": 9090} in rule["ports"]]
    assert len(scraping) == 3
    for rule in (*scraping, runtime_policy({})["spec"]["ingress"][1]):
        [peer] = rule["from"]
        assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
        assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}


def test_only_a_profile_with_a_cloud_identity_reaches_the_address_that_gives_it() -> None:
    values = {"runtimeProfiles": {"identified": {"cloudIdentity": True}}}

    def addresses(profile: str) -> set[str]:
        rules = runtime_policy(values, profile)["spec"]["egress"]
        return {peer["ipBlock"]["cidr"] for rule in rules for peer in rule["to"] if "ipBlock" in peer}

    assert "169.254.169.254/32" in addresses("identified") - addresses("default")


def test_without_network_policies_the_operator_makes_none_and_needs_no_right() -> None:
    values = {"networkPolicy": {"enabled": False}}
    text = of_kind(render(values), "ConfigMap")["lorapool-runtime-profiles"]["data"]["profiles.yaml"]
    assert list(network_policy(base(), parse_profiles(text, origin="chart")["default"])) == []
    assert not any("networkpolicies" in line for lines in grants(render(values)).values() for line in lines)


def test_keys_have_a_namespace_of_their_own_which_an_uninstall_keeps() -> None:
    [namespace] = of_kind(render(), "Namespace").values()
    assert namespace["metadata"]["name"] == f"{NAMESPACE}-keys"
    assert namespace["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    secrets = [line for line in grants(render())["lorapool-gateway"] if "secrets" in line]
    assert secrets == [f"in {NAMESPACE}-keys: list watch secrets"]
    assert environment(render(), "gateway")["LORAPOOL_GATEWAY_KEYS_NAMESPACE"] == f"{NAMESPACE}-keys"
    for values in ({"apiKeys": {"namespace": NAMESPACE}}, {"apiKeys": {"createNamespace": False}}):
        assert of_kind(render(values), "Namespace") == {}


def test_editors_of_a_namespace_write_adapters_and_by_default_no_bases() -> None:
    for values, kinds in (({}, {"loraadapters"}), ({"baseModels": True}, {"loraadapters", "basemodels"})):
        roles = of_kind(render({"rbac": {"aggregateClusterRoles": values}}), "ClusterRole")
        edit = roles[f"{NAMESPACE}-lorapool-edit"]
        assert {name for rule in edit["rules"] for name in rule["resources"] if "/" not in name} == kinds
        assert {name for rule in roles[f"{NAMESPACE}-lorapool-view"]["rules"] for name in rule["resources"]} >= {
            "loraadapters",
            "basemodels",
        }
    off = {"rbac": {"aggregateClusterRoles": {"loraAdapters": False}}}
    assert not [name for name in of_kind(render(off), "ClusterRole") if name.endswith(("-edit", "-view"))]


@pytest.mark.parametrize("values", [NAMESPACED, CLUSTER], ids=["namespaced", "cluster"])
def test_no_pod_reaches_the_credentials_of_its_node(values: dict[str, Any]) -> None:
    for name, policy in of_kind(render(values), "NetworkPolicy").items():
        for rule in policy["spec"].get("egress", []):
            assert "to" in rule, f"{name} may go anywhere"
            for peer in rule["to"]:
                block = peer.get("ipBlock", {})
                if block.get("cidr") == "0.0.0.0/0":
                    assert "169.254.0.0/16" in block["except"], name


def test_the_rights_for_fine_tuning_exist_only_with_it() -> None:
    tuning = grants(render({**NAMESPACED, "tuning": {"enabled": True}}))["lorapool-operator"]
    more = set(tuning) - set(grants(render(NAMESPACED))["lorapool-operator"])
    assert {line.partition(": ")[2] for line in more} == {
        "get list watch patch delete finetunejobs.lorapool.dev",
        "patch finetunejobs/status.lorapool.dev",
        "create loraadapters.lorapool.dev",
        "get list watch create delete jobs.batch",
    }
