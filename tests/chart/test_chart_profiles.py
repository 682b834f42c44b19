"""Profiles with every field: what the chart renders, what the operator makes of it, what the API server accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from apiserver import ApiServer, running_apiserver
from chart_kit import NAMESPACE, environment, of_kind, pod_of, refusal, render, restricted_violations
from profile_kit import CONSISTENT, CONTRADICTIONS

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.common import FIELD_MANAGER
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.manifests import children
from lorapool_operator.world.cluster_cache import BaseObject, Meta
from lorapool_operator.world.profiles import ProfilesError, RuntimeImage, RuntimeProfile, parse_profiles

FULL = """
allowedNamespaces: [lorapool-system, team-a]
resources:
  requests: {cpu: "1", memory: 1Gi}
  limits: {memory: 1Gi}
  claims: [{name: gpu}]
cache:
  pvc:
    accessModes: [ReadWriteMany]
    storageClassName: fast
    resources: {requests: {storage: 200Gi}}
minReadySeconds: 7
podDisruptionBudget: {minAvailable: 1}
cloudIdentity: true
pod:
  serviceAccountName: models
  schedulerName: volcano
  resourceClaims: [{name: gpu, resourceClaimTemplateName: one-gpu}]
  topologySpreadConstraints:
    - {maxSkew: 1, topologyKey: topology.kubernetes.io/zone, whenUnsatisfiable: ScheduleAnyway}
  volumes:
    - name: templates
      configMap: {name: chat-templates}
  initContainers:
    - {name: warm, image: busybox, command: ["true"]}
  containers:
    - {name: sidecar, image: busybox, command: [sleep, infinity]}
container:
  envFrom: [{secretRef: {name: more}}]
  volumeMounts: [{name: templates, mountPath: /templates, readOnly: true}]
  startupProbe: {periodSeconds: 5, failureThreshold: 720}
  livenessProbe: {failureThreshold: 20}
"""


CLAIM = {"accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "resources": {"requests": {"storage": "200Gi"}}}


def profile_of(values: dict[str, Any], name: str = "full") -> RuntimeProfile:
    text = of_kind(render(values), "ConfigMap")["lorapool-runtime-profiles"]["data"]["profiles.yaml"]
    return parse_profiles(text, origin="chart")[name]


def full(**more: Any) -> RuntimeProfile:
    return profile_of({"runtimeProfiles": {"full": {**yaml.safe_load(FULL), **more}}})


def children_of(profile: RuntimeProfile) -> dict[str, dict[str, Any]]:
    """The children of a base with this profile, by kind."""
    meta = Meta(NAMESPACE, "tiny", "11111111-2222-3333-4444-555555555555", 1, "1", 0.0, False, None)
    spec = BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}})
    base = BaseObject(meta, spec, BaseModelStatus())
    made = children(
        base,
        profile,
        RuntimeImage("runtime:1", "Always"),
        replicas=1,
        token_sha256=("ab" * 32,),
        rules=SourceRules(owner="team"),
    )
    return {child["kind"]: child for child in made}


def pod_spec(profile: RuntimeProfile) -> dict[str, Any]:
    found: dict[str, Any] = children_of(profile)["Deployment"]["spec"]["template"]["spec"]
    return found


def test_fragments_are_added_to_what_the_operator_writes_and_replace_nothing_of_it() -> None:
    plain, spec = pod_spec(RuntimeProfile()), pod_spec(full())
    [runtime, sidecar] = spec["containers"]

    assert (spec["serviceAccountName"], spec["schedulerName"]) == ("models", "volcano")
    assert spec["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    assert [item["name"] for item in spec["initContainers"]] == ["warm"]
    assert sidecar["name"] == "sidecar"
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"] == plain["securityContext"]
    assert runtime["resources"]["claims"] == [{"name": "gpu"}]
    assert runtime["envFrom"] == [{"secretRef": {"name": "more"}}]
    assert {item["mountPath"] for item in runtime["volumeMounts"]} >= {"/tmp", "/cache", "/models", "/templates"}
    assert {item["name"] for item in spec["volumes"]} >= {"tmp", "cache", "models", "templates"}


def test_probes_keep_what_a_profile_does_not_tune() -> None:
    runtime = pod_spec(full())["containers"][0]

    assert (runtime["startupProbe"]["periodSeconds"], runtime["startupProbe"]["failureThreshold"]) == (5, 720)
    assert runtime["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert runtime["livenessProbe"]["failureThreshold"] == 20
    assert runtime["livenessProbe"]["httpGet"]["path"] == "/healthz"
    encrypted = full(env=[{"name": "LORAPOOL_RUNTIME_METRICS_TLS_DIR", "value": "/tls"}])
    probe = pod_spec(encrypted)["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/readyz", "port": "metrics", "scheme": "HTTPS"}


def test_a_spread_without_a_selector_selects_the_pods_of_the_base() -> None:
    made = children_of(full())["Deployment"]["spec"]
    [constraint] = made["template"]["spec"]["topologySpreadConstraints"]

    assert constraint["labelSelector"] == {"matchLabels": made["selector"]["matchLabels"]}
    own = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
    [kept] = pod_spec(full(pod={"topologySpreadConstraints": [own]}))["topologySpreadConstraints"]
    assert kept == own


def test_each_kind_of_cache_is_mounted_and_a_claim_belongs_to_the_base() -> None:
    def models(cache: dict[str, Any]) -> dict[str, Any]:
        [volume] = [item for item in pod_spec(full(cache=cache))["volumes"] if item["name"] == "models"]
        return {key: value for key, value in volume.items() if key != "name"}

    made = children_of(full())
    template = {"spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}

    assert list(made) == [
        "ConfigMap",
        "PersistentVolumeClaim",
        "NetworkPolicy",
        "Deployment",
        "Service",
        "PodDisruptionBudget",
    ]
    assert made["PersistentVolumeClaim"]["spec"]["storageClassName"] == "fast"
    assert made["PersistentVolumeClaim"]["metadata"]["ownerReferences"][0]["name"] == "tiny"
    assert models(yaml.safe_load(FULL)["cache"]) == {"persistentVolumeClaim": {"claimName": "tiny-runtime"}}
    assert models({"hostPath": {"path": "/var/models"}}) == {"hostPath": {"path": "/var/models"}}
    assert models({"ephemeral": {"volumeClaimTemplate": template}}) == {"ephemeral": {"volumeClaimTemplate": template}}
    assert "models" not in {item["name"] for item in pod_spec(RuntimeProfile())["volumes"]}


def dry_run(server: ApiServer, made: list[dict[str, Any]]) -> None:
    """Applies objects without storing them; the API server refuses fields that it does not know."""
    for item in made:
        item["metadata"].pop("ownerReferences", None)
        item["metadata"]["namespace"] = NAMESPACE
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": made})
    options = ("--server-side", "--dry-run=server", "--validate=strict", f"--field-manager={FIELD_MANAGER}")
    said = server.kubectl("apply", *options, "-f", "-", stdin=listed)
    assert len(said.splitlines()) == len(made)


def test_a_cache_has_exactly_one_kind() -> None:
    for cache in ("{}", "{pvc: {}, hostPath: {path: /m}}"):
        with pytest.raises(ProfilesError, match="exactly one"):
            parse_profiles(f"profiles: {{default: {{cache: {cache}}}}}", origin="values")
    assert "cache" in refusal({"runtimeProfiles": {"default": {"cache": {"pvc": {}, "hostPath": {"path": "/m"}}}}})


@pytest.mark.parametrize("where", ["pod", "container"])
def test_what_would_override_the_operator_is_refused_by_chart_and_operator(where: str) -> None:
    field = {"pod": "hostNetwork", "container": "command"}[where]
    assert field in refusal({"runtimeProfiles": {"default": {where: {field: True}}}})
    with pytest.raises(ProfilesError, match=f"{field} cannot be set here; possible are"):
        parse_profiles(f"profiles: {{default: {{{where}: {{{field}: true}}}}}}", origin="values")


@pytest.mark.parametrize("wrong", CONTRADICTIONS)
def test_a_profile_that_contradicts_itself_is_not_rendered(wrong: str) -> None:
    said = refusal({"runtimeProfiles": {"fleet": CONTRADICTIONS[wrong].profile}})
    assert "runtimeProfiles.fleet: " in said
    assert CONTRADICTIONS[wrong].words in said


@pytest.mark.parametrize("right", CONSISTENT)
def test_a_consistent_profile_is_rendered(right: str) -> None:
    made = profile_of({"runtimeProfiles": {"fleet": CONSISTENT[right]}}, "fleet")
    assert made.engine == CONSISTENT[right].get("engine", "torch")


def test_each_engine_has_its_image() -> None:
    images = {"registry": "r", "runtimeVllm": {"tag": "v", "pullPolicy": "Always"}}
    read = environment(render({"image": images}), "operator")
    assert read["LORAPOOL_OPERATOR_RUNTIME_VLLM_IMAGE"] == "r/lorapool-runtime-vllm:v"
    assert read["LORAPOOL_OPERATOR_RUNTIME_VLLM_IMAGE_PULL_POLICY"] == "Always"
    assert read["LORAPOOL_OPERATOR_RUNTIME_IMAGE"].startswith("r/lorapool-runtime:")


def test_budget_and_min_ready_seconds_come_from_the_profile() -> None:
    made, plain = children_of(full()), children_of(RuntimeProfile())

    assert made["Deployment"]["spec"]["minReadySeconds"] == 7
    assert plain["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    budget = made["PodDisruptionBudget"]["spec"]
    assert (budget["minAvailable"], "maxUnavailable" in budget) == (1, False)
    assert budget["selector"] == plain["PodDisruptionBudget"]["spec"]["selector"]


def test_only_an_operator_that_asks_for_it_reaches_the_clouds_identities() -> None:
    for asked in (True, False):
        policies = of_kind(render({"operator": {"cloudIdentity": asked}}), "NetworkPolicy")
        reached = {
            name
            for name, policy in policies.items()
            for rule in policy["spec"].get("egress", [])
            if {"ipBlock": {"cidr": "169.254.169.254/32"}} in rule["to"]
        }
        assert reached == ({"lorapool-operator"} if asked else set())


def test_a_platform_that_assigns_users_is_asked_for_none() -> None:
    manifests = render({"fixedUsers": False, "runtimeProfiles": {"own": {"runAsUser": 12345}}})
    for deployment in of_kind(manifests, "Deployment").values():
        context = deployment["spec"]["template"]["spec"]["securityContext"]
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(context)
        assert context["runAsNonRoot"] is True
    for name, user in (("default", None), ("own", 12345)):
        profile = profile_of({"fixedUsers": False, "runtimeProfiles": {"own": {"runAsUser": 12345}}}, name)
        assert pod_spec(profile)["securityContext"].get("runAsUser") == user
    assert pod_spec(RuntimeProfile())["securityContext"]["runAsUser"] >= 10000


def test_a_bundle_of_authorities_is_trusted_by_operator_and_runtimes() -> None:
    values = {"artifacts": {"caBundle": {"configMap": "authorities", "key": "root.pem"}}}
    pod = pod_of(of_kind(render(values), "Deployment")["lorapool-operator"])
    assert pod is not None
    for spec in (pod["spec"], pod_spec(profile_of(values, "default"))):
        container = spec["containers"][0]
        [volume] = [item for item in spec["volumes"] if item["name"] == "ca-bundle"]
        assert volume["configMap"] == {"name": "authorities", "items": [{"key": "root.pem", "path": "ca.crt"}]}
        mount = {"name": "ca-bundle", "mountPath": "/etc/lorapool/ca", "readOnly": True}
        assert mount in container["volumeMounts"]
        env = {item["name"]: item.get("value") for item in container["env"]}
        assert env["SSL_CERT_FILE"] == env["REQUESTS_CA_BUNDLE"] == "/etc/lorapool/ca/ca.crt"
    assert "ca-bundle" not in json.dumps(render())


def test_variables_of_a_proxy_reach_operator_and_runtimes_and_not_the_gateway() -> None:
    values = {"artifacts": {"env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]}}
    deployments = of_kind(render(values), "Deployment")
    pods = {name: deployment["spec"]["template"]["spec"] for name, deployment in deployments.items()}
    pods["runtime"] = pod_spec(profile_of(values, "default"))
    reached = {name for name, spec in pods.items() if "http://proxy:3128" in json.dumps(spec["containers"][0]["env"])}
    assert reached == {"lorapool-operator", "runtime"}


def test_metrics_are_served_with_the_secrets_that_the_values_name() -> None:
    metrics = {
        "tls": {"secret": "metrics-tls", "serverName": "metrics.example"},
        "token": {"secret": "metrics-token", "key": "bearer"},
        "serviceMonitor": {"enabled": True},
        "podMonitor": {"enabled": True},
    }
    manifests = render({"metrics": metrics})
    pods = {
        name.removeprefix("lorapool-"): deployment["spec"]["template"]
        for name, deployment in of_kind(manifests, "Deployment").items()
    }
    pods["runtime"] = children_of(profile_of({"metrics": metrics}, "default"))["Deployment"]["spec"]["template"]
    for process, pod in pods.items():
        container = pod["spec"]["containers"][0]
        volumes = {item["name"]: item.get("secret", {}) for item in pod["spec"]["volumes"]}
        env = {item["name"]: item.get("value") for item in container["env"]}
        assert volumes["metrics-tls"]["secretName"] == "metrics-tls"
        assert volumes["metrics-token"]["items"] == [{"key": "bearer", "path": "token"}]
        assert env[f"LORAPOOL_{process.upper()}_METRICS_TLS_DIR"] == "/etc/lorapool/metrics-tls"
        assert env[f"LORAPOOL_{process.upper()}_METRICS_TOKEN_FILE"] == "/etc/lorapool/metrics-token/token"
        assert pod["metadata"]["annotations"]["prometheus.io/scheme"] == "https"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe") if process != "runtime" else ():
            assert container[probe]["httpGet"]["scheme"] == "HTTPS", (process, probe)
    monitors = [*of_kind(manifests, "ServiceMonitor").values(), *of_kind(manifests, "PodMonitor").values()]
    for monitor in monitors:
        [endpoint] = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint["scheme"], endpoint["tlsConfig"]["serverName"]) == ("https", "metrics.example")
        assert endpoint["authorization"]["credentials"] == {"name": "metrics-token", "key": "bearer"}
    assert "metrics-t" not in json.dumps(render())


def test_credentials_are_also_mounted_so_that_a_changed_secret_needs_no_restart() -> None:
    values = {"artifacts": {"credentials": {"existingSecret": "hub"}}}
    operator = pod_of(of_kind(render(values), "Deployment")["lorapool-operator"])
    assert operator is not None
    for spec in (operator["spec"], pod_spec(profile_of(values, "default"))):
        [volume] = [item for item in spec["volumes"] if item["name"] == "credentials"]
        assert volume["secret"]["secretName"] == "hub"
        assert volume["secret"]["optional"] is True
        assert {"key": "HF_TOKEN", "path": "HF_TOKEN"} in volume["secret"]["items"]
        container = spec["containers"][0]
        [mount] = [item for item in container["volumeMounts"] if item["name"] == "credentials"]
        assert {"name": "LORAPOOL_CREDENTIALS_DIR", "value": mount["mountPath"]} in container["env"]
    assert "LORAPOOL_CREDENTIALS_DIR" not in json.dumps(render())


def test_claims_are_only_a_right_where_a_profile_makes_them() -> None:
    def resources(values: dict[str, Any]) -> set[str]:
        role = of_kind(render(values), "Role")["lorapool-operator"]
        return {resource for rule in role["rules"] for resource in rule["resources"]}

    assert "persistentvolumeclaims" not in resources({})
    assert "persistentvolumeclaims" in resources({"runtimeProfiles": {"full": yaml.safe_load(FULL)}})


def test_the_operator_has_a_budget_too() -> None:
    budget = of_kind(render(), "PodDisruptionBudget")["lorapool-operator"]["spec"]

    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"]["app.kubernetes.io/component"] == "operator"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("profiles")) as running:
        running.kubectl("create", "namespace", NAMESPACE)
        yield running


@pytest.mark.apiserver
def test_the_api_server_accepts_every_child_of_a_profile_that_uses_everything(
    server: ApiServer,
) -> None:
    values = {
        "runtimeProfiles": {"full": yaml.safe_load(FULL)},
        "artifacts": {"caBundle": {"configMap": "authorities"}},
    }
    dry_run(server, list(children_of(profile_of(values)).values()))
    assert restricted_violations(pod_spec(full(pod={}, container={}))) == []


@pytest.mark.apiserver
@pytest.mark.parametrize(
    "profile",
    [
        {"cache": {"hostPath": {"path": "/var/models", "type": "DirectoryOrCreate"}}},
        {"cache": {"ephemeral": {"volumeClaimTemplate": {"spec": CLAIM}}}},
        {"runAsUser": 0, "podDisruptionBudget": {"maxUnavailable": "50%"}, "rollout": {"strategy": "Recreate"}},
        {"rollout": {"maxSurge": "25%", "maxUnavailable": 0}, "shmSizeLimit": "1Gi"},
    ],
    ids=["hostPath", "ephemeral", "assigned user", "rollout"],
)
def test_the_api_server_accepts_each_cache_user_and_rollout(server: ApiServer, profile: dict[str, Any]) -> None:
    dry_run(server, list(children_of(profile_of({"runtimeProfiles": {"full": profile}})).values()))


@pytest.mark.apiserver
def test_the_api_server_accepts_the_charts_own_objects_with_every_option_for_administrators(server: ApiServer) -> None:
    values = {
        "fixedUsers": False,
        "artifacts": {
            "caBundle": {"configMap": "authorities"},
            "credentials": {"existingSecret": "hub"},
            "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        },
        "metrics": {"tls": {"secret": "metrics-tls"}, "token": {"secret": "metrics-token"}},
        "operator": {"cloudIdentity": True},
        "runtimeProfiles": {"full": yaml.safe_load(FULL)},
    }
    kinds = {"ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Role", "Service", "ServiceAccount"}
    made = [item for item in render(values) if item["kind"] in kinds]
    assert {item["kind"] for item in made} == kinds
    dry_run(server, made)
