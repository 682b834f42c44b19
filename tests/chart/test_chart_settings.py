"""The environment and files from the chart are valid for the settings models of the processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from chart_kit import CHART, NAMESPACE, environment, of_kind, pod_of, render

from lorapool_artifacts.policy import parse_policy
from lorapool_gateway import settings as gateway_settings
from lorapool_operator import settings as operator_settings
from lorapool_operator.world import profiles as operator_profiles

NAMESPACED: dict[str, Any] = {"watchNamespaces": ["team-b", "team-a"]}
CLUSTER: dict[str, Any] = {"scope": "cluster"}


def test_the_gateway_starts_with_what_the_chart_gives() -> None:
    settings = gateway_settings.read_settings(environment(render({"apiKeys": {"namespace": "keys"}}), "gateway"))

    assert settings.namespaces == frozenset({NAMESPACE})
    assert settings.keys_namespace == "keys"


def test_the_operator_starts_with_what_the_chart_gives() -> None:
    settings = operator_settings.read_settings(environment(render(), "operator"))

    assert settings.namespaces == frozenset({NAMESPACE})
    assert settings.own_namespace == NAMESPACE
    assert settings.identity == "lorapool-operator-abc"


def test_the_bound_of_a_base_model_fits_150_gb_and_reaches_the_operator() -> None:
    assert operator_settings.read_settings(environment(render(), "operator")).sources.base_max_bytes >= 150e9
    raised = render({"artifacts": {"maxBaseBytes": 900_000_000_000}})
    assert operator_settings.read_settings(environment(raised, "operator")).sources.base_max_bytes == 900_000_000_000


def test_the_bound_of_an_adapter_reaches_the_operator() -> None:
    raised = render({"artifacts": {"env": [{"name": "LORAPOOL_MAX_ADAPTER_BYTES", "value": "9000000000"}]}})
    assert operator_settings.read_settings(environment(raised, "operator")).sources.max_adapter_bytes == 9_000_000_000


@pytest.mark.parametrize("origins", [["https://app.example.com", "http://localhost:3000"], ["*"], []])
def test_the_origins_of_browser_pages_reach_the_gateway(origins: list[str]) -> None:
    manifests = render({"gateway": {"corsOrigins": origins}})
    assert gateway_settings.read_settings(environment(manifests, "gateway")).cors_origins == frozenset(origins)


def test_the_bound_of_concurrent_rollouts_and_a_profiles_rollout_reach_the_operator() -> None:
    profile = {"rollout": {"strategy": "Recreate"}}
    manifests = render({"operator": {"rollout": {"maxConcurrentBases": 3}}, "runtimeProfiles": {"gpu": profile}})
    assert operator_settings.read_settings(environment(manifests, "operator")).max_concurrent_rollouts == 3
    found = of_kind(manifests, "ConfigMap")["lorapool-runtime-profiles"]
    profiles = operator_profiles.parse_profiles(found["data"]["profiles.yaml"], origin="chart")
    assert profiles["gpu"].rollout.strategy == "Recreate"


@pytest.mark.parametrize(("values", "watched"), [(NAMESPACED, frozenset({"team-a", "team-b"})), (CLUSTER, None)])
def test_gateway_and_operator_watch_the_same_namespaces(values: dict[str, Any], watched: frozenset[str] | None) -> None:
    manifests = render(values)

    assert gateway_settings.read_settings(environment(manifests, "gateway")).namespaces == watched
    assert operator_settings.read_settings(environment(manifests, "operator")).namespaces == watched


def test_the_charts_defaults_are_the_codes_defaults() -> None:
    """The chart's defaults equal the defaults of a process that is started by hand."""
    manifests = render()
    gateway = gateway_settings.read_settings(environment(manifests, "gateway"))
    operator = operator_settings.read_settings(environment(manifests, "operator"))
    # Tracked adapters: the chart sets one bound for all processes. TLS: a process alone has no authority.
    differs = {"namespaces", "keys_namespace", "own_namespace", "identity", "profiles_file"}
    differs |= {"runtime_image", "runtime_vllm_image"}
    differs |= {"max_tracked_adapters", "source_policy_file", "internal_tls", "quota_file"}
    differs |= {"ledger_url", "journal_dir", "runtime_usage", "ledger_tls_secret"}  # a release has a ledger

    for settings in (gateway, operator):
        for name, field in type(settings).model_fields.items():
            if name not in differs:
                assert getattr(settings, name) == field.default, name


def test_files_are_mounted_where_the_settings_look() -> None:
    manifests = render()
    for component, settings in (
        ("gateway", gateway_settings.read_settings(environment(manifests, "gateway"))),
        ("operator", operator_settings.read_settings(environment(manifests, "operator"))),
    ):
        pod = pod_of(of_kind(manifests, "Deployment")[f"lorapool-{component}"])
        assert pod is not None
        container = pod["spec"]["containers"][0]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[str(settings.master_token_file.parent)] == "runtime-token"
        if isinstance(settings, gateway_settings.Settings):
            assert mounts[str(settings.internal_ca_file.parent)] == "internal-ca"
        if isinstance(settings, operator_settings.Settings):
            assert mounts[str(settings.internal_ca_dir)] == "internal-ca"
            assert mounts[str(settings.profiles_file.parent)] == "runtime-profiles"
            assert settings.profiles_file.name in of_kind(manifests, "ConfigMap")["lorapool-runtime-profiles"]["data"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == settings.metrics_port


def test_the_lease_the_operator_takes_is_the_one_its_role_names() -> None:
    manifests = render({"fullnameOverride": "second"}, release="lorapool")
    deployment = of_kind(manifests, "Deployment")["second-operator"]
    env = {item["name"]: item.get("value") for item in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    role = of_kind(manifests, "Role")["second-operator-lease"]

    assert role["rules"][0]["resourceNames"] == [env["LORAPOOL_OPERATOR_LEASE_NAME"]]


def profiles(values: dict[str, Any]) -> operator_profiles.Profiles:
    text = of_kind(render(values), "ConfigMap")["lorapool-runtime-profiles"]["data"]["profiles.yaml"]
    return operator_profiles.parse_profiles(text, origin="chart")


def test_the_default_profiles_are_read_by_the_operator() -> None:
    assert set(profiles({})) == {"default"}


def test_the_gpu_example_in_the_comments_is_read_by_the_operator() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    start = lines.index("  # gpu:")
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("  #"))
    example = yaml.safe_load("\n".join(line[4:] for line in lines[start:end]))

    read = profiles({"runtimeProfiles": example})

    assert set(read) == {"default", "gpu"}
    assert read["gpu"].resources["limits"]["nvidia.com/gpu"] == 1


def test_every_field_of_a_profile_is_known_to_schema_and_operator() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["$defs"]["profile"]["properties"]
    fields = {str(field.alias) for field in operator_profiles.RuntimeProfile.model_fields.values()}

    assert set(schema) == fields


def test_artifact_settings_credentials_and_pull_secrets_reach_every_profile() -> None:
    read = profiles(
        {
            "imagePullSecrets": [{"name": "pull"}],
            "artifacts": {
                "insecureRegistries": ["one:5000", "two"],
                "maxBaseBytes": 200_000_000_000,
                "baseFetchTimeoutSeconds": 7200,
                "env": [{"name": "HF_ENDPOINT", "value": "http://hub"}],
                "credentials": {"existingSecret": "hub", "keys": ["HF_TOKEN"]},
            },
            "runtimeProfiles": {"own": {"env": [{"name": "A", "value": "b"}], "imagePullSecrets": ["other"]}},
        }
    )

    for profile in read.values():
        assert profile.env[0] == {"name": "LORAPOOL_OCI_INSECURE_HOSTS", "value": "one:5000,two"}
        assert [item["name"] for item in profile.env][3:5] == ["HF_ENDPOINT", "HF_TOKEN"]
        assert {item["name"]: item.get("value") for item in profile.env}.items() >= {
            "LORAPOOL_BASE_MAX_BYTES": "200000000000",
            "LORAPOOL_BASE_FETCH_TIMEOUT_S": "7200",
        }.items()
    assert read["default"].image_pull_secrets == ("pull",)
    assert read["own"].image_pull_secrets == ("other",)
    assert read["own"].env[-1] == {"name": "A", "value": "b"}


def test_the_policy_of_sources_reaches_the_operator_and_private_hosts_reach_all() -> None:
    entries = {"team-b": {"prefixes": ["hf://team-b/"], "credentials": "Own", "credentialsSecret": "mine"}, "*": {}}
    artifacts = {"policy": entries, "privateHosts": ["registry.lan:5000"], "namespaceCredentials": "sources"}
    manifests = render({"artifacts": artifacts})
    operator = operator_settings.read_settings(environment(manifests, "operator"))
    found = of_kind(manifests, "ConfigMap")["lorapool-runtime-profiles"]
    policy = parse_policy(found["data"]["source-policy.yaml"], origin="chart")
    assert operator.source_policy_file is not None
    assert operator.source_policy_file.name in found["data"]
    assert policy.secret_of("team-b", operator.namespace_credentials) == "mine"
    assert policy.secret_of("team-c", operator.namespace_credentials) == "sources"
    assert policy.of("team-b") != policy.of("other")
    assert operator.sources.private_hosts == {"registry.lan:5000"}
    env = {item["name"]: item.get("value") for item in profiles({"artifacts": artifacts})["default"].env}
    assert env["LORAPOOL_SOURCE_PRIVATE_HOSTS"] == "registry.lan:5000"
    rights = [rule for role in of_kind(manifests, "Role").values() for rule in role["rules"]]
    assert [
        rule["resourceNames"] for rule in rights if rule["resources"] == ["secrets"] and rule["verbs"] == ["get"]
    ] == [["mine", "sources"]]


def test_fine_tuning_has_its_quotas_and_a_priority_class_below_serving() -> None:
    quotas = {"activeJobs": 3, "unfinishedJobs": 5, "tokensPerMonth": 1_000_000}
    manifests = render({"tuning": {"enabled": True, "quotas": quotas}, "store": {"enabled": True}})
    settings = operator_settings.read_settings(environment(manifests, "operator"))
    gateway = gateway_settings.read_settings(environment(manifests, "gateway"))
    assert (settings.tuning_month_tokens, gateway.tuning_unfinished_jobs) == (1_000_000, 5)
    [made] = of_kind(manifests, "PriorityClass").values()
    assert (settings.tuning, settings.tuning_active_jobs, settings.tuning_unfinished_jobs) == (True, 3, 5)
    assert settings.tuning_priority_class == made["metadata"]["name"]
    assert (made["value"] < 0, made["preemptionPolicy"]) == (True, "Never")
    assert of_kind(render({}), "PriorityClass") == {}


def test_the_record_of_trained_tokens_is_the_one_that_the_operators_role_names() -> None:
    manifests = render({"tuning": {"enabled": True, "quotas": {"tokensPerMonth": 5}}})
    settings = operator_settings.read_settings(environment(manifests, "operator"))
    rules = of_kind(manifests, "Role")["lorapool-operator-lease"]["rules"]
    assert [(rule.get("resourceNames"), rule["verbs"]) for rule in rules if rule["resources"] == ["configmaps"]] == [
        ([f"{settings.lease_name}-tokens"], ["get", "patch"]),
        (None, ["create"]),
    ]
    assert "configmaps" not in str(of_kind(render({"tuning": {"enabled": True}}), "Role")["lorapool-operator-lease"])


def test_a_profiles_queue_for_trainers_reaches_the_operator() -> None:
    trainer = {"suspend": True, "jobLabels": {"kueue.x-k8s.io/queue-name": "gpu"}, "priorityClassName": "low"}
    found = profiles({"runtimeProfiles": {"gpu": {"trainer": trainer}}})["gpu"].trainer
    assert (found.suspend, found.job_labels, found.priority_class_name) == (True, trainer["jobLabels"], "low")
