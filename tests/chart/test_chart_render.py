"""What the chart renders for each value, and which values it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chart_kit
import pytest
import yaml
from chart_kit import ALL_ON, CHART, NAMESPACE, RELEASE, Manifest, environment, of_kind, pod_of, refusal, render, run

from lorapool_operator.world.profiles import RuntimeProfile

CLUSTER: dict[str, Any] = {**ALL_ON, "scope": "cluster", "watchNamespaces": []}
ALL_OFF: dict[str, Any] = {
    "crds": {"install": False},
    "rbac": {"create": False, "aggregateClusterRoles": {"baseModels": False, "loraAdapters": False}},
    "apiKeys": {"createNamespace": False},
    "networkPolicy": {"enabled": False},
    "metrics": {"scrapeAnnotations": False},
    "runtimeToken": {"existingSecret": "mine", "key": "master"},
    "internalTLS": {"enabled": False},
    "ledger": {"enabled": False},
    "operator": {
        "serviceAccount": {"create": False, "name": "own-operator"},
        "podDisruptionBudget": {"enabled": False},
    },
    "gateway": {
        "serviceAccount": {"create": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpreadConstraints": [],
    },
}
EXAMPLES = {"defaults": {}, "all_on": ALL_ON, "cluster": CLUSTER, "all_off": ALL_OFF}


@pytest.mark.parametrize("values", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_lint_has_nothing_to_say(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))

    result = run("helm", "lint", "--strict", CHART, "--values", file)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout


@pytest.mark.parametrize("values", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_every_object_is_labelled_named_once_and_selects_its_own_pods(values: dict[str, Any]) -> None:
    manifests = render(values)
    seen = set()
    for manifest in manifests:
        metadata = manifest["metadata"]
        key = (manifest["kind"], metadata.get("namespace"), metadata["name"])
        assert key not in seen
        seen.add(key)
        assert len(metadata["name"]) <= 63
        if "extra" in metadata["name"] or metadata["name"] == "text":
            continue
        assert metadata["labels"]["app.kubernetes.io/instance"] == RELEASE, key
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "Helm", key
        for label, value in values.get("commonLabels", {}).items():
            assert metadata["labels"][label] == value, key
        for name, value in values.get("commonAnnotations", {}).items():
            assert metadata["annotations"][name] == value, key
    for deployment in of_kind(manifests, "Deployment").values():
        selector = deployment["spec"]["selector"]["matchLabels"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert "helm.sh/chart" not in selector, "an upgrade would change an immutable selector"


def test_the_defaults_render_what_a_first_installation_needs_and_no_more() -> None:
    kinds = {manifest["kind"] for manifest in render()}

    assert kinds == {
        "ClusterRole",
        "ConfigMap",
        "CustomResourceDefinition",
        "Deployment",
        "Namespace",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "Pod",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "Secret",
        "Service",
        "ServiceAccount",
    }


def test_every_switch_brings_its_objects() -> None:
    kinds = {manifest["kind"] for manifest in render(ALL_ON)}

    assert kinds >= {
        "HorizontalPodAutoscaler",
        "HTTPRoute",
        "Ingress",
        "PodMonitor",
        "PrometheusRule",
        "ServiceMonitor",
    }


def test_switched_off_parts_leave_nothing_behind() -> None:
    kinds = {manifest["kind"] for manifest in render(ALL_OFF)}

    assert kinds == {"ConfigMap", "Deployment", "Pod", "Service"}


def test_a_component_uses_the_configured_service_account() -> None:
    deployments = of_kind(render(ALL_OFF), "Deployment")

    assert deployments["lorapool-operator"]["spec"]["template"]["spec"]["serviceAccountName"] == "own-operator"
    assert deployments["lorapool-gateway"]["spec"]["template"]["spec"]["serviceAccountName"] == "default"


def test_a_digest_wins_over_a_tag_and_pull_secrets_reach_every_pod() -> None:
    manifests = render(ALL_ON)
    for manifest in manifests:
        if pod := pod_of(manifest):
            image = pod["spec"]["containers"][0]["image"]
            assert image == "registry.example:5000/ml/lorapool-control@sha256:" + "a" * 64
            assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_one_tag_serves_both_images_and_one_image_may_differ() -> None:
    manifests = render({"image": {"registry": "r", "tag": "dev", "runtime": {"tag": "gpu"}}})
    operator = of_kind(manifests, "Deployment")["lorapool-operator"]["spec"]["template"]["spec"]["containers"][0]

    assert operator["image"] == "r/lorapool-control:dev"
    assert environment(manifests, "operator")["LORAPOOL_OPERATOR_RUNTIME_IMAGE"] == "r/lorapool-runtime:gpu"


def test_autoscaling_owns_the_gateways_replicas() -> None:
    on, off = (of_kind(render(values), "Deployment")["lorapool-gateway"] for values in (ALL_ON, {}))

    assert "replicas" not in on["spec"]
    assert off["spec"]["replicas"] == 2


def test_one_operator_is_replaced_before_the_next_starts() -> None:
    operator = of_kind(render(), "Deployment")["lorapool-operator"]

    assert operator["spec"]["replicas"] == 1
    assert operator["spec"]["strategy"] == {"type": "Recreate"}


def test_a_gateway_has_time_to_drain_before_it_is_killed() -> None:
    spec = of_kind(render({"gateway": {"shutdownDelaySeconds": 7, "drainSeconds": 200}}), "Deployment")[
        "lorapool-gateway"
    ]["spec"]["template"]["spec"]

    assert spec["terminationGracePeriodSeconds"] == 217


def test_a_gateway_waits_for_its_requests_as_long_as_the_slowest_runtime_does() -> None:
    def drain_seconds(profiles: Manifest) -> tuple[str, int]:
        deployment = of_kind(render({"runtimeProfiles": profiles}), "Deployment")["lorapool-gateway"]
        spec = deployment["spec"]["template"]["spec"]
        env = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
        return env["LORAPOOL_GATEWAY_DRAIN_TIMEOUT_S"], spec["terminationGracePeriodSeconds"]

    default = RuntimeProfile().termination_grace_period_seconds
    assert drain_seconds({}) == (str(default), default + 15)
    assert drain_seconds({"long": {"terminationGracePeriodSeconds": 3600}}) == ("3600", 3615)
    assert drain_seconds({"default": {"terminationGracePeriodSeconds": 60}}) == ("60", 75)


def test_no_pod_gets_the_variables_of_services() -> None:
    # A Service called lorapool-gateway would inject LORAPOOL_GATEWAY_PORT=tcp://…
    for manifest in render(ALL_ON):
        if pod := pod_of(manifest):
            assert pod["spec"]["enableServiceLinks"] is False


def test_every_long_lived_container_is_probed() -> None:
    for name, deployment in of_kind(render(), "Deployment").items():
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}, name
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}, name


def test_a_slow_start_does_not_fail_the_liveness_probe() -> None:
    for name, deployment in of_kind(render(), "Deployment").items():
        probe = deployment["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
        assert probe["httpGet"] == {"path": "/healthz", "port": "metrics"}, name
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 120, name


def test_pods_have_scrape_annotations_unless_switched_off() -> None:
    for values, scraped in (({}, True), (ALL_OFF, False)):
        for deployment in of_kind(render(values), "Deployment").values():
            annotations = deployment["spec"]["template"]["metadata"].get("annotations", {})
            assert ("prometheus.io/scrape" in annotations) is scraped


def test_crds_are_the_generated_ones_and_survive_an_uninstall() -> None:
    rendered = of_kind(render(), "CustomResourceDefinition")
    files = sorted((chart_kit.REPOSITORY / "crds").glob("*.yaml"))

    assert len(files) == len(rendered) == 3
    for file in files:
        generated = yaml.safe_load(file.read_text())
        mine = rendered[generated["metadata"]["name"]]
        assert mine["spec"] == generated["spec"]
        assert mine["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert yaml.safe_load((CHART / "files" / "crds" / file.name).read_text()) == generated


def test_two_releases_share_no_cluster_scoped_name() -> None:
    def cluster_scoped(namespace: str) -> set[tuple[str, str]]:
        values = {"scope": "cluster", "crds": {"install": False}}
        return {
            (manifest["kind"], manifest["metadata"]["name"])
            for manifest in render(values, namespace=namespace)
            if "namespace" not in manifest["metadata"]
        }

    one, two = cluster_scoped("one"), cluster_scoped("two")

    assert one
    assert not one & two


def test_long_names_are_cut_and_stay_valid() -> None:
    for manifest in render({"fullnameOverride": "x" * 39 + "-y"}, release="r" * 53):
        assert len(manifest["metadata"]["name"]) <= 63


def test_dashboards_become_config_maps_that_a_sidecar_finds() -> None:
    maps = of_kind(render(ALL_ON), "ConfigMap")
    files = {file.stem: file for file in (CHART / "dashboards").glob("*.json")}

    assert set(files) == {"fleet", "base", "adapter", "tuning", "bill"}
    for name, file in files.items():
        config_map = maps[f"lorapool-dashboard-{name}"]
        assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert config_map["metadata"]["annotations"]["grafana_folder"] == "Lorapool"
        assert json.loads(config_map["data"][f"lorapool-{name}.json"]) == json.loads(file.read_text())
        assert len(config_map["data"][f"lorapool-{name}.json"]) < 2**19


def test_monitors_carry_the_labels_a_prometheus_selects_by_and_find_their_targets() -> None:
    manifests = render(ALL_ON)
    for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule"):
        for monitor in of_kind(manifests, kind).values():
            assert monitor["metadata"]["labels"]["release"] == "kps"
    services = of_kind(manifests, "Service").values()
    pods = [pod for manifest in manifests if (pod := pod_of(manifest)) and manifest["kind"] == "Deployment"]
    monitors = of_kind(manifests, "ServiceMonitor")
    assert set(monitors) == {"lorapool-gateway", "lorapool-ledger", "lorapool-operator"}
    for monitor in monitors.values():
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        [service] = [item for item in services if wanted <= item["metadata"]["labels"].items()]
        [pod] = [item for item in pods if service["spec"]["selector"].items() <= item["metadata"]["labels"].items()]
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports[monitor["spec"]["endpoints"][0]["port"]] == 9090
        assert monitor["spec"]["endpoints"][0]["interval"] == "15s"


def test_alerts_can_be_labelled_and_left_out() -> None:
    def alerts(rule: dict[str, Any]) -> dict[str, dict[str, Any]]:
        values = {"metrics": {"prometheusRule": {"enabled": True, **rule}}}
        [manifest] = of_kind(render(values), "PrometheusRule").values()
        return {
            entry["alert"]: entry
            for group in manifest["spec"]["groups"]
            for entry in group["rules"]
            if "alert" in entry
        }

    every = alerts({})
    some = alerts({"disabledAlerts": ["LorapoolRuntimeDown"], "alertLabels": {"team": "ml"}})

    assert set(every) - set(some) == {"LorapoolRuntimeDown"}
    for entry in some.values():
        assert entry["labels"]["team"] == "ml"
        assert entry["labels"]["severity"] in {"warning", "critical", "info"}


def test_extra_objects_are_rendered_as_templates() -> None:
    assert {"lorapool-extra", "text"} <= set(of_kind(render(ALL_ON), "ConfigMap"))


def test_the_notes_name_the_gateway_a_key_and_the_missing_base() -> None:
    # A dry run for a client renders the notes without any cluster.
    result = run("helm", "install", RELEASE, CHART, "--namespace", NAMESPACE, "--dry-run=client")

    assert result.returncode == 0, result.stderr
    notes = result.stdout.partition("NOTES:")[2]
    for expected in (
        f"kubectl port-forward --namespace {NAMESPACE} service/lorapool-gateway 8080:80",
        "curl http://127.0.0.1:8080/v1/models",
        "kubectl get bm,lora",
        "lorapool.dev/api-key=true",
        "WARNING: there is no BaseModel yet",
        "additionalLabels.release",
    ):
        assert expected in notes


@pytest.mark.parametrize("values", [ALL_ON, CLUSTER], ids=["all_on", "cluster"])
def test_the_notes_render_with_everything_on(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))

    result = run("helm", "install", RELEASE, CHART, "--namespace", NAMESPACE, "--dry-run=client", "--values", file)

    assert result.returncode == 0, result.stderr
    assert "https://llm.example.com" in result.stdout.partition("NOTES:")[2]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"gatewayy": {}}, "gatewayy"),
        ({"gateway": {"replcas": 1}}, "replcas"),
        ({"gateway": {"replicas": "two"}}, "integer"),
        ({"gateway": {"logLevel": "TRACE"}}, "logLevel"),
        ({"gateway": {"service": {"type": "ExternalName"}}}, "type"),
        ({"gateway": {"podDisruptionBudget": {"maxUnavailable": "many"}}}, "maxUnavailable"),
        ({"image": {"control": {"digest": "latest"}}}, "digest"),
        ({"artifacts": {"insecureRegistries": ["http://registry"]}}, "insecureRegistries"),
        ({"scope": "galaxy"}, "scope"),
        ({"watchNamespaces": ["Team_A"]}, "watchNamespaces"),
        ({"runtimeProfiles": {"default": {"hostNetwork": True}}}, "hostNetwork"),
        ({"runtimeProfiles": {"default": {"env": [{"value": "x"}]}}}, "name"),
        ({"networkPolicy": {"sources": {"blocks": [{"cidr": "anywhere"}]}}}, "cidr"),
        ({"metrics": {"serviceMonitor": {"interval": "often"}}}, "interval"),
        ({"scope": "cluster", "watchNamespaces": ["a"]}, "watchNamespaces must be empty"),
        ({"networkPolicy": {"runtimeNamespaces": ["a"]}}, "runtimeNamespaces"),
        ({"rbac": {"aggregateClusterRoles": True}}, "aggregateClusterRoles"),
        ({"apiKeys": {"whenStale": "guess"}}, "whenStale"),
        ({"ingress": {"enabled": True}}, "ingress.hosts"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"runtimeProfiles": {"default": None}}, "default"),
    ],
)
def test_a_misspelt_or_impossible_value_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    assert named in refusal(values)


def test_values_of_a_parent_chart_are_allowed() -> None:
    assert render({"global": {"anything": {"at": "all"}}})
