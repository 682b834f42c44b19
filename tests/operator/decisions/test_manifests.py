"""The children of a base: restricted pods without secrets, in which a tenant decides only settings."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.common import ANNOTATION_SPEC_HASH, LABEL_BASE, LABEL_BASE_UID
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.manifests import children, template_hash
from lorapool_operator.decisions.pods import content_hash, pod_template
from lorapool_operator.world.cluster_cache import BaseObject, Meta
from lorapool_operator.world.profiles import ProfilesError, RuntimeImage, RuntimeProfile, parse_profiles
from lorapool_runtime.settings import read_settings

IMAGE = RuntimeImage("registry.example/runtime:1", "IfNotPresent")
HASH = "ab" * 32
RULES = SourceRules(owner="team")


def base(**spec: Any) -> BaseObject:
    meta = Meta("team", "tiny", "base-uid", 1, "1", 0.0, False, None)
    made = BaseModelSpec.model_validate({"source": {"uri": "hf://org/base", "revision": "main"}, **spec})
    return BaseObject(meta, made, BaseModelStatus())


def made(profile: RuntimeProfile | None = None, **spec: Any) -> list[dict[str, Any]]:
    return children(base(**spec), profile or RuntimeProfile(), IMAGE, replicas=2, token_sha256=(HASH,), rules=RULES)


def pod(profile: RuntimeProfile | None = None, **spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = made(profile, **spec)[1]["spec"]["template"]
    return found


def env(profile: RuntimeProfile | None = None, **spec: Any) -> dict[str, str]:
    items = pod(profile, **spec)["spec"]["containers"][0]["env"]
    return {item["name"]: item["value"] for item in items if "value" in item}


def test_every_child_is_owned_by_its_base_and_blocks_no_deletion() -> None:
    assert [child["kind"] for child in made()] == ["ConfigMap", "Deployment", "Service", "PodDisruptionBudget"]
    for child in made():
        owner = child["metadata"]["ownerReferences"][0]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("base-uid", True, False)


def test_a_policy_of_the_profile_is_made_for_the_pods_of_this_base_before_there_are_any() -> None:
    rules = {"ingress": [{"from": [{"podSelector": {}}]}], "egress": []}
    [_, policy, deployment, *_] = made(RuntimeProfile(network_policy=rules))
    assert (policy["kind"], deployment["kind"]) == ("NetworkPolicy", "Deployment")
    assert policy["metadata"]["namespace"] == "team"
    selected = {"podSelector": {"matchLabels": {LABEL_BASE: "tiny", LABEL_BASE_UID: "base-uid"}}}
    assert policy["spec"] == {**selected, "policyTypes": ["Ingress", "Egress"], **rules}


def test_the_runtime_learns_the_uid_of_its_pod_from_the_kubelet() -> None:
    items = pod()["spec"]["containers"][0]["env"]
    [found] = [item["valueFrom"] for item in items if item["name"] == "LORAPOOL_RUNTIME_POD_UID"]
    assert found == {"fieldRef": {"fieldPath": "metadata.uid"}}


def test_pods_pass_the_restricted_standard() -> None:
    spec = pod()["spec"]
    container = spec["containers"][0]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)


def test_the_runtime_reads_exactly_the_settings_that_the_operator_writes() -> None:
    settings = read_settings([], env(lora={"maxRank": 8, "slots": 3, "hostCacheBytes": "64Mi"}, maxModelLen=512))
    assert (settings.model, settings.revision, settings.max_rank, settings.slots) == ("hf://org/base", "main", 8, 3)
    assert (settings.max_model_len, settings.host_cache_bytes) == (512, 64 * 2**20)
    assert (settings.base_label, settings.served_name) == ("team/tiny", "tiny")
    assert 600 < settings.drain_grace_s < RuntimeProfile().termination_grace_period_seconds  # no long answer is cut


def test_the_pod_holds_neither_a_secret_nor_a_token() -> None:
    text = json.dumps(made())
    assert "secretKeyRef" not in text
    assert "serviceAccountName" not in text


def test_the_hashes_of_both_tokens_are_mounted_and_a_rotation_rolls_no_pod() -> None:
    other = "cd" * 32
    before, after = (
        children(base(), RuntimeProfile(), IMAGE, replicas=2, token_sha256=hashes, rules=RULES)
        for hashes in ((HASH,), (other, HASH))
    )
    assert after[0]["data"]["sha256"] == f"{other}\n{HASH}\n"
    assert before[1:] == after[1:]
    assert before[0] != after[0]
    spec = after[1]["spec"]["template"]["spec"]
    assert {"name": "token", "configMap": {"name": after[0]["metadata"]["name"]}} in spec["volumes"]
    mount = {"name": "token", "mountPath": "/etc/lorapool/token", "readOnly": True}
    assert mount in spec["containers"][0]["volumeMounts"], "without subPath, which would keep the first version"
    assert env()["LORAPOOL_TOKEN_SHA256_FILE"] == "/etc/lorapool/token/sha256"


def test_a_recreated_base_never_adopts_old_pods() -> None:
    _, deployment, service, budget = made()
    wanted = {LABEL_BASE: "tiny", LABEL_BASE_UID: "base-uid"}
    assert deployment["spec"]["selector"]["matchLabels"] == wanted
    assert service["spec"]["selector"] == wanted
    assert budget["spec"]["selector"]["matchLabels"] == wanted
    assert wanted.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_a_change_of_the_spec_changes_the_template_and_scaling_does_not() -> None:
    one = pod_template(base(), RuntimeProfile(), IMAGE)
    two = pod_template(base(scaling={"maxReplicas": 9}), RuntimeProfile(), IMAGE)
    other = pod_template(base(lora={"slots": 9}), RuntimeProfile(), IMAGE)
    assert content_hash(one) == content_hash(two) != content_hash(other)
    assert all(child["metadata"]["annotations"][ANNOTATION_SPEC_HASH] for child in made())


def test_pods_keep_usage_records_in_a_folder_of_their_own_when_the_release_has_a_ledger() -> None:
    plain = pod_template(base(), RuntimeProfile(), IMAGE)["spec"]
    spec = pod_template(base(), RuntimeProfile(), replace(IMAGE, keeps_usage=True))["spec"]
    [container] = spec["containers"]
    variable = {"name": "LORAPOOL_RUNTIME_USAGE_DIR", "value": "/usage"}
    mount, volume = {"name": "usage", "mountPath": "/usage"}, {"name": "usage", "emptyDir": {"sizeLimit": "1Gi"}}
    assert (variable in container["env"], mount in container["volumeMounts"], volume in spec["volumes"]) == (True,) * 3
    environ = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    read = {name: value for name, value in environ.items() if name.startswith("LORAPOOL_RUNTIME_")}
    assert str(read_settings([], read | {"LORAPOOL_RUNTIME_LISTEN_HOST": "127.0.0.1"}).usage_dir) == "/usage"
    assert "usage" not in str(plain["volumes"]) + str(plain["containers"][0]["volumeMounts"])


def test_a_profile_decides_image_nodes_and_volumes_and_never_overrides_the_operators_settings() -> None:
    profile = parse_profiles(
        """
        profiles:
          gpu:
            image: registry.example/gpu:2
            nodeSelector: {gpu: "yes"}
            tolerations: [{key: gpu, operator: Exists}]
            imagePullSecrets: [pull]
            priorityClassName: high
            volumes: [{claim: models}]
            shmSizeLimit: 1Gi
            env:
              - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hub, key: token}}}
              - {name: LORAPOOL_TOKEN_SHA256_FILE, value: /tmp/stolen}
        """,
        origin="values",
    )["gpu"]
    spec = pod(profile)["spec"]
    container = spec["containers"][0]
    assert container["image"] == "registry.example/gpu:2"
    assert spec["nodeSelector"] == {"gpu": "yes"}
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert {"name": "pvc-0", "mountPath": "/pvc/models", "readOnly": True} in container["volumeMounts"]
    assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])
    assert env(profile)["LORAPOOL_TOKEN_SHA256_FILE"] == "/etc/lorapool/token/sha256"
    assert any(item["name"] == "HF_TOKEN" for item in container["env"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profiles: {a: {imagee: x}}", "profiles.a.imagee"),
        ("profiles: {a: {cacheSizeLimit: much}}", "profiles.a.cacheSizeLimit"),
        ("[", "not YAML"),
        ("other: 1", "profiles"),
    ],
)
def test_a_bad_profiles_file_is_refused_with_the_field(text: str, message: str) -> None:
    with pytest.raises(ProfilesError, match="values") as caught:
        parse_profiles(text, origin="values")
    assert message in str(caught.value)


def test_pods_drain_before_the_kubelet_kills_them() -> None:
    profile = RuntimeProfile(termination_grace_period_seconds=90)
    assert pod(profile)["spec"]["terminationGracePeriodSeconds"] == 90
    assert float(env(profile)["LORAPOOL_RUNTIME_DRAIN_GRACE_S"]) == 85


def test_objects_with_different_uids_have_different_selectors() -> None:
    other = replace(base(), meta=replace(base().meta, uid="other"))
    one = children(base(), RuntimeProfile(), IMAGE, replicas=1, token_sha256=(HASH,), rules=RULES)[1]
    two = children(other, RuntimeProfile(), IMAGE, replicas=1, token_sha256=(HASH,), rules=RULES)[1]
    assert one["spec"]["selector"] != two["spec"]["selector"]


GPU = {"limits": {"nvidia.com/gpu": 1}}
CPU = {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}}


@pytest.mark.parametrize(
    ("resources", "rollout", "surge", "unavailable"),
    [
        (CPU, {}, 1, 0),
        (GPU, {}, 0, 1),
        ({"requests": {"amd.com/gpu": "2"}}, {}, 0, 1),
        ({"claims": [{"name": "gpu"}]}, {}, 0, 1),
        (GPU, {"maxSurge": 1}, 1, 0),
        (GPU, {"maxUnavailable": 0}, 1, 0),
        (CPU, {"maxSurge": 0}, 0, 1),
        (CPU, {"maxSurge": "50%", "maxUnavailable": 2}, "50%", 2),
    ],
)
def test_pods_are_replaced_without_a_spare_gpu_unless_the_profile_says_otherwise(
    resources: dict[str, Any], rollout: dict[str, Any], surge: int | str, unavailable: int
) -> None:
    profile = RuntimeProfile.model_validate({"resources": resources, "rollout": rollout})
    bounds = {"maxSurge": surge, "maxUnavailable": unavailable}
    assert made(profile)[1]["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": bounds}


def test_a_profile_may_stop_all_pods_before_it_starts_new_ones() -> None:
    profile = RuntimeProfile.model_validate({"rollout": {"strategy": "Recreate"}})
    assert made(profile)[1]["spec"]["strategy"] == {"type": "Recreate"}


def test_a_rollout_that_could_replace_no_pod_is_refused() -> None:
    text = "profiles: {a: {rollout: {maxSurge: 0, maxUnavailable: 0}}}"
    with pytest.raises(ProfilesError, match="must not both be 0"):
        parse_profiles(text, origin="values")


def test_pods_carry_the_hash_of_their_template_which_scaling_does_not_change() -> None:
    first = children(base(), RuntimeProfile(), IMAGE, replicas=1, token_sha256=(HASH,), rules=RULES)
    scaled = children(base(), RuntimeProfile(), IMAGE, replicas=5, token_sha256=(HASH,), rules=RULES, paused=True)
    changed = children(base(), RuntimeProfile(threads=2), IMAGE, replicas=1, token_sha256=(HASH,), rules=RULES)
    assert template_hash(first) == template_hash(scaled) != template_hash(changed)
    assert (first[1]["spec"]["paused"], scaled[1]["spec"]["paused"]) == (False, True)


def test_the_rules_for_sources_are_mounted_and_a_change_of_them_rolls_no_pod() -> None:
    granted = SourceRules(owner="team", grants={"guest": ("pvc://models/guest/",)})
    before, after = (
        children(base(), RuntimeProfile(), IMAGE, replicas=2, token_sha256=(HASH,), rules=rules)
        for rules in (RULES, granted)
    )
    assert SourceRules.model_validate_json(after[0]["data"]["source-rules.json"]) == granted
    assert before[0] != after[0]
    assert before[1:] == after[1:]
    assert env()["LORAPOOL_RUNTIME_SOURCE_RULES_FILE"].endswith("/source-rules.json")


def vllm(**more: Any) -> RuntimeProfile:
    known = {"engine": "vllm", "tensorParallel": 4, "pipelineParallel": 2, "shmSizeLimit": "16Gi"}
    return RuntimeProfile.model_validate({**known, **more})


def test_a_profile_of_another_engine_has_its_settings_and_defaults() -> None:
    made, plain = env(vllm()), env()
    own = {"LORAPOOL_RUNTIME_ENGINE": "vllm", "LORAPOOL_RUNTIME_TENSOR_PARALLEL": "4"}
    assert made.items() >= {**own, "LORAPOOL_RUNTIME_PIPELINE_PARALLEL": "2", "USER": "lorapool"}.items()
    assert made["NCCL_DEBUG"] == "WARN"
    read = read_settings([], made)  # the runtime knows them by the same names
    assert (read.engine, read.tensor_parallel, read.pipeline_parallel) == ("vllm", 4, 2)
    assert "NCCL_DEBUG" not in env(RuntimeProfile(engine="vllm"))
    assert not [name for name in plain if "PARALLEL" in name or "ENGINE" in name or name in ("USER", "NCCL_DEBUG")]
    spec = pod(vllm())["spec"]
    assert spec["containers"][0]["startupProbe"]["failureThreshold"] * 2 == 1800
    volumes = {item["name"]: item.get("emptyDir") for item in spec["volumes"]}
    assert volumes["tmp"] == {"sizeLimit": "8Gi"}
    assert volumes["shm"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in spec["containers"][0]["volumeMounts"]


def test_what_a_profile_says_itself_takes_precedence_over_the_defaults_of_its_engine() -> None:
    own = vllm(env=[{"name": "USER", "value": "me"}, {"name": "NCCL_DEBUG", "value": "INFO"}], tmpSizeLimit="2Gi")
    assert env(own).items() >= {"USER": "me", "NCCL_DEBUG": "INFO"}.items()
    assert own.tmp_size_limit == RuntimeProfile(engine="vllm", tmp_size_limit="2Gi").tmp_size_limit == "2Gi"
    assert (own.startup_timeout_seconds, RuntimeProfile().startup_timeout_seconds) == (1800, 900)
    names = [item["name"] for item in pod(own)["spec"]["containers"][0]["env"]]
    assert len(names) == len(set(names))
