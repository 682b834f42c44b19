"""The children of a BaseModel as plain objects, ready for server-side apply.

Pods pass the `restricted` pod security standard. They hold no service-account token, only the sha256 of the bearer
tokens that gateway and operator derive, and the key of their base's certificate. Nothing in a tenant's spec becomes a
path, an image or a volume; those come from the administrator's profile.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorapool_api.common import (
    ANNOTATION_SPEC_HASH,
    ANNOTATION_TEMPLATE_HASH,
    FIELD_MANAGER,
    LABEL_BASE,
    LABEL_BASE_UID,
    LABEL_COMPONENT,
    LABEL_INSTANCE,
    LABEL_MANAGED_BY,
    LABEL_NAME,
    quantity_bytes,
)
from lorapool_api.pod_address import ENCRYPTED, PLAIN
from lorapool_api.protocol import (
    ENV_TOKEN_SHA256_FILE,
    ROUTE_HEALTH,
    ROUTE_METRICS,
    ROUTE_READY,
    RUNTIME_PORT,
    BaseChat,
    PreloadList,
)
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.runtime_tls import owner_reference, serve_tls
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.profiles import ModelCache, RuntimeImage, RuntimeProfile, device_names

MANAGED_BY = FIELD_MANAGER
METRICS_PORT = 9090
ENV_POD_UID = "LORAPOOL_RUNTIME_POD_UID"
METRICS_PORT_NAME = "metrics"
METRICS_TLS_VARIABLE = "LORAPOOL_RUNTIME_METRICS_TLS_DIR"
CACHE_DIR = "/cache"
MODELS_DIR = "/models"
PVC_ROOT = "/pvc"
TOKEN_DIR = "/etc/lorapool/token"
TOKEN_HASHES_FILE = "sha256"
PRELOAD_FILE = "preload.json"
SOURCE_RULES_FILE = "source-rules.json"
CHAT_FILE = "chat.json"
ENV_CHAT_FILE = "LORAPOOL_RUNTIME_CHAT_FILE"
CACHE_RESERVE = 0.1
"""The share of the cache volume that adapters may not use: temporary files need room, and the kubelet evicts a pod
that reaches its limit."""
DRAIN_RESERVE_S = 5
"""The runtime stops draining this long before the kubelet kills it."""

NO_PRELOAD = PreloadList()

Manifest = dict[str, Any]


def children_name(base_name: str) -> str:
    """Returns the name that all children of a base have."""
    return f"{base_name}-runtime"


def selector_labels(base: BaseObject) -> dict[str, str]:
    """Returns the labels that only pods of this very object have, not those of a deleted one of the same name."""
    return {LABEL_BASE: base.meta.name, LABEL_BASE_UID: base.meta.uid}


def selector_text(base: BaseObject) -> str:
    """Returns the selector as text, for status.selector of the scale subresource."""
    return ",".join(f"{key}={value}" for key, value in sorted(selector_labels(base).items()))


def children(
    base: BaseObject,
    profile: RuntimeProfile,
    image: RuntimeImage,
    *,
    replicas: int,
    token_sha256: tuple[str, ...],
    rules: SourceRules,
    preload: PreloadList = NO_PRELOAD,
    paused: bool = False,
    tls: bool = False,
) -> list[Manifest]:
    """Returns all children, each with the hash of its own content as an annotation.

    With `tls` the pods serve HTTPS; the Secret of their certificate is not among the children, since bases share it.
    """
    made = [
        files(base, token_sha256, rules, preload),
        *model_cache_claim(base, profile),
        *network_policy(base, profile),  # before the pods that it is for
        deployment(base, profile, image, replicas=replicas, paused=paused, tls=tls),
        service(base, ENCRYPTED if tls else PLAIN),
        pdb(base, profile),
    ]
    for child in made:
        child["metadata"]["annotations"] = {ANNOTATION_SPEC_HASH: content_hash(child)}
    return made


def content_hash(manifest: Manifest) -> str:
    """Returns a short hash of the whole object, the same for equal content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def files(base: BaseObject, token_sha256: tuple[str, ...], rules: SourceRules, preload: PreloadList) -> Manifest:
    """Returns the ConfigMap with the hashes of the accepted bearer tokens, the rules for sources, what the base says
    about chats, and what new pods load first.

    A change of it restarts no pod.
    """
    hot = {PRELOAD_FILE: json.dumps(preload.dump(), sort_keys=True)} if preload.adapters else {}
    chat = BaseChat(chat_template=base.spec.chat_template, generation=base.spec.generation)
    said = {CHAT_FILE: json.dumps(chat.dump(), sort_keys=True)} if chat != BaseChat() else {}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(base),
        "data": {
            TOKEN_HASHES_FILE: "".join(f"{digest}\n" for digest in token_sha256),
            SOURCE_RULES_FILE: rules.model_dump_json(by_alias=True, exclude_none=True),
            **hot,
            **said,
        },
    }


def model_cache_claim(base: BaseObject, profile: RuntimeProfile) -> Iterator[Manifest]:
    """Yields the claim of the base's own cache volume, if the profile asks for one."""
    if profile.cache is not None and profile.cache.pvc is not None:
        kind = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
        yield {**kind, "metadata": _metadata(base), "spec": profile.cache.pvc}


def network_policy(base: BaseObject, profile: RuntimeProfile) -> Iterator[Manifest]:
    """Yields the policy of the base's pods, if the profile has one; no namespace needs one of the chart's."""
    if profile.network_policy:
        kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
        rules = {"podSelector": {"matchLabels": selector_labels(base)}, "policyTypes": ["Ingress", "Egress"]}
        yield {**kind, "metadata": _metadata(base), "spec": {**rules, **profile.network_policy}}


def deployment(
    base: BaseObject, profile: RuntimeProfile, image: RuntimeImage, *, replicas: int, paused: bool, tls: bool = False
) -> Manifest:
    """Returns the Deployment. While it is paused, its pods are not replaced when the template changes."""
    template = pod_template(base, profile, image)
    if tls:
        serve_tls(template["spec"], base)
    template["metadata"]["annotations"][ANNOTATION_TEMPLATE_HASH] = content_hash(template)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(base),
        "spec": {
            "replicas": replicas,
            "paused": paused,
            "selector": {"matchLabels": selector_labels(base)},
            "strategy": strategy(profile),
            "minReadySeconds": profile.min_ready_seconds,
            "progressDeadlineSeconds": profile.startup_timeout_seconds + 60,
            "revisionHistoryLimit": 2,
            "template": template,
        },
    }


def strategy(profile: RuntimeProfile) -> Manifest:
    """Returns how pods are replaced: by default one new pod comes first, but not where it would need free devices."""
    rollout = profile.rollout
    if rollout.strategy == "Recreate":
        return {"type": "Recreate"}
    surge = rollout.max_surge
    if surge is None:
        devices = device_names(profile.resources) or profile.resources.get("claims")
        surge = 0 if devices and rollout.max_unavailable not in (0, "0%") else 1
    unavailable = rollout.max_unavailable
    if unavailable is None:
        unavailable = 1 if surge in (0, "0%") else 0
    return {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": unavailable, "maxSurge": surge}}


def template_hash(made: Sequence[Manifest]) -> str:
    """Returns the hash of the pod template among these children; empty without a Deployment."""
    templates = (child["spec"]["template"] for child in made if child["kind"] == "Deployment")
    return next((str(item["metadata"]["annotations"][ANNOTATION_TEMPLATE_HASH]) for item in templates), "")


def service(base: BaseObject, scheme: str = PLAIN) -> Manifest:
    """Returns a headless Service, by which monitoring and other clients find the pods; the gateway reads the pods."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(base),
        "spec": {
            "clusterIP": "None",
            "selector": selector_labels(base),
            "ports": [
                {"name": scheme, "port": RUNTIME_PORT, "targetPort": scheme, "protocol": "TCP"},
                {"name": METRICS_PORT_NAME, "port": METRICS_PORT, "targetPort": METRICS_PORT_NAME, "protocol": "TCP"},
            ],
        },
    }


def pdb(base: BaseObject, profile: RuntimeProfile) -> Manifest:
    """Returns the budget, by default of one: the drain of a node can proceed, but never stops two replicas at once."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(base),
        "spec": {
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            **profile.pod_disruption_budget,
            "selector": {"matchLabels": selector_labels(base)},
        },
    }


def pod_template(base: BaseObject, profile: RuntimeProfile, image: RuntimeImage) -> Manifest:
    """Returns the pod template: restricted, without a service-account token, placed as the profile says."""
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": profile.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            **_user(profile.run_as_user),
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(base, profile, image)],
        "volumes": _volumes(base, profile),
    }
    optional = {
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
        "nodeSelector": profile.node_selector,
        "tolerations": list(profile.tolerations),
        "affinity": profile.affinity,
        "priorityClassName": profile.priority_class_name,
        "runtimeClassName": profile.runtime_class_name,
    }
    spec.update({name: value for name, value in optional.items() if value})
    spec = merged(spec, profile.pod)
    for constraint in spec.get("topologySpreadConstraints", ()):
        constraint.setdefault("labelSelector", {"matchLabels": selector_labels(base)})
    return {
        "metadata": {
            "labels": {**profile.pod_labels, **_labels(base)},
            "annotations": {
                "prometheus.io/scrape": "true",
                "prometheus.io/port": str(METRICS_PORT),
                "prometheus.io/path": ROUTE_METRICS,
                "kubectl.kubernetes.io/default-container": "runtime",
                **profile.pod_annotations,
            },
        },
        "spec": spec,
    }


def merged(ours: Manifest, overlay: Mapping[str, Any]) -> Manifest:
    """Returns a copy of `ours` with the overlay: maps are merged by key, lists are appended, other values replaced."""
    result = copy.deepcopy(ours)
    for name, value in overlay.items():
        before = result.get(name)
        if isinstance(before, dict) and isinstance(value, Mapping):
            result[name] = merged(before, value)
        elif isinstance(before, list) and isinstance(value, list):
            result[name] = before + copy.deepcopy(value)
        else:
            result[name] = copy.deepcopy(value)
    return result


def _user(user: int) -> Manifest:
    return {"runAsUser": user, "runAsGroup": user, "fsGroup": user} if user else {}


def _container(base: BaseObject, profile: RuntimeProfile, image: RuntimeImage) -> Manifest:
    ours: Manifest = {
        "name": "runtime",
        "image": profile.image or image.image,
        "imagePullPolicy": profile.image_pull_policy or image.pull_policy,
        "command": ["python", "-m", "lorapool_runtime"],
        "env": _env(base, profile),
        "ports": [
            {"name": PLAIN, "containerPort": RUNTIME_PORT, "protocol": "TCP"},
            {"name": METRICS_PORT_NAME, "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "resources": profile.resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "startupProbe": {
            **_probe(ROUTE_READY, profile),
            "periodSeconds": 2,
            "failureThreshold": max(1, profile.startup_timeout_seconds // 2),
        },
        "readinessProbe": {**_probe(ROUTE_READY, profile), "periodSeconds": 3, "failureThreshold": 2},
        "livenessProbe": {**_probe(ROUTE_HEALTH, profile), "periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": _mounts(profile),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # so that the pod's status says why the process ended
    }
    return merged(ours, profile.container)


def _env(base: BaseObject, profile: RuntimeProfile) -> list[Manifest]:
    """Returns the runtime's settings from the spec, after the profile's variables so that they take precedence."""
    spec = base.spec
    cache_bytes = int(quantity_bytes(profile.cache_size_limit) * (1 - CACHE_RESERVE))
    values = {
        "MODEL": spec.source.uri,
        "REVISION": spec.source.revision or "",
        "SERVED_NAME": spec.served_name or base.meta.name,
        "BASE_LABEL": f"{base.meta.namespace}/{base.meta.name}",
        "DTYPE": spec.dtype.value,
        "MAX_MODEL_LEN": str(spec.max_model_len),
        "MAX_RANK": str(spec.lora.max_rank),
        "SLOTS": str(spec.lora.slots),
        "HOST_CACHE_BYTES": str(quantity_bytes(spec.lora.host_cache_bytes)),
        "PREFIX_SHARING": spec.prefix_cache.sharing.value,
        "LISTEN_PORT": str(RUNTIME_PORT),
        "METRICS_PORT": str(METRICS_PORT),
        "CACHE_DIR": f"{CACHE_DIR}/artifacts",
        "CACHE_BYTES": str(cache_bytes),
        "PVC_ROOT": PVC_ROOT,
        "THREADS": str(profile.threads) if profile.threads else "",
        "DRAIN_GRACE_S": str(profile.termination_grace_period_seconds - DRAIN_RESERVE_S),
    }
    ours: list[Manifest] = [
        {"name": f"LORAPOOL_RUNTIME_{name}", "value": value} for name, value in values.items() if value
    ]
    if profile.cache is not None:
        ours.append({"name": "LORAPOOL_RUNTIME_BASE_CACHE_DIR", "value": MODELS_DIR})
    ours.append({"name": ENV_TOKEN_SHA256_FILE, "value": f"{TOKEN_DIR}/{TOKEN_HASHES_FILE}"})
    ours.append({"name": "LORAPOOL_RUNTIME_PRELOAD_FILE", "value": f"{TOKEN_DIR}/{PRELOAD_FILE}"})
    ours.append({"name": "LORAPOOL_RUNTIME_SOURCE_RULES_FILE", "value": f"{TOKEN_DIR}/{SOURCE_RULES_FILE}"})
    ours.append({"name": ENV_CHAT_FILE, "value": f"{TOKEN_DIR}/{CHAT_FILE}"})
    ours.append({"name": ENV_POD_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}})
    ours += [
        {"name": "HOME", "value": "/tmp"},
        {"name": "HF_HOME", "value": f"{CACHE_DIR}/hf"},
        {"name": "TORCHINDUCTOR_CACHE_DIR", "value": "/tmp/inductor"},
    ]
    taken = {item["name"] for item in ours}
    return [item for item in profile.env if item.get("name") not in taken] + ours


def _volumes(base: BaseObject, profile: RuntimeProfile) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "token", "configMap": {"name": children_name(base.meta.name)}},
        {"name": "tmp", "emptyDir": {"sizeLimit": profile.tmp_size_limit}},
        {"name": "cache", "emptyDir": {"sizeLimit": profile.cache_size_limit}},
    ]
    if profile.cache is not None:
        volumes.append({"name": "models", **_model_cache(base, profile.cache)})
    if profile.shm_size_limit:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": profile.shm_size_limit}})
    for index, volume in enumerate(profile.volumes):
        claim = {"claimName": volume.claim, "readOnly": volume.read_only}
        volumes.append({"name": f"pvc-{index}", "persistentVolumeClaim": claim})
    return volumes


def _model_cache(base: BaseObject, cache: ModelCache) -> Manifest:
    if cache.pvc is not None:
        return {"persistentVolumeClaim": {"claimName": children_name(base.meta.name)}}
    return {"hostPath": cache.host_path} if cache.host_path is not None else {"ephemeral": cache.ephemeral}


def _mounts(profile: RuntimeProfile) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "token", "mountPath": TOKEN_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_DIR},
    ]
    if profile.cache is not None:
        mounts.append({"name": "models", "mountPath": MODELS_DIR})
    if profile.shm_size_limit:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    for index, volume in enumerate(profile.volumes):
        path = f"{PVC_ROOT}/{volume.claim}"
        mounts.append({"name": f"pvc-{index}", "mountPath": path, "readOnly": volume.read_only})
    return mounts


def _probe(path: str, profile: RuntimeProfile) -> Manifest:
    """On the metrics port, which a thread of its own answers however busy the runtime is."""
    encrypted = any(item["name"] == METRICS_TLS_VARIABLE and item.get("value") for item in profile.env)
    scheme = {"scheme": "HTTPS"} if encrypted else {}
    return {"httpGet": {"path": path, "port": METRICS_PORT_NAME, **scheme}, "timeoutSeconds": 3}


def _labels(base: BaseObject) -> dict[str, str]:
    return {
        LABEL_NAME: "lorapool-runtime",
        LABEL_INSTANCE: base.meta.name,
        LABEL_COMPONENT: "runtime",
        LABEL_MANAGED_BY: MANAGED_BY,
        **selector_labels(base),
    }


def _metadata(base: BaseObject) -> Manifest:
    return {
        "name": children_name(base.meta.name),
        "namespace": base.meta.namespace,
        "labels": _labels(base),
        "ownerReferences": [{**owner_reference(base), "controller": True}],
    }
