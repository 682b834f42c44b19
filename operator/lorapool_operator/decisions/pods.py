"""The template of a BaseModel's runtime pods as a plain object.

Pods pass the `restricted` pod security standard. They hold no service-account token, only the sha256 of the bearer
tokens that gateway and operator derive, and the key of their base's certificate. Nothing in a tenant's spec becomes a
path, an image or a volume; those come from the profile.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lorapool_api.common import (
    FIELD_MANAGER,
    LABEL_BASE,
    LABEL_BASE_UID,
    LABEL_COMPONENT,
    LABEL_GROUP_INDEX,
    LABEL_INSTANCE,
    LABEL_MANAGED_BY,
    LABEL_NAME,
    LABEL_WORKER_INDEX,
    quantity_bytes,
)
from lorapool_api.pod_address import PLAIN
from lorapool_api.protocol import ENV_TOKEN_SHA256_FILE, ROUTE_HEALTH, ROUTE_METRICS, ROUTE_READY, RUNTIME_PORT
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.profiles import AdapterCache, ModelCache, RuntimeImage, RuntimeProfile

MANAGED_BY = FIELD_MANAGER
METRICS_PORT = 9090
ENV_POD_UID = "LORAPOOL_RUNTIME_POD_UID"
METRICS_PORT_NAME = "metrics"
METRICS_TLS_VARIABLE = "LORAPOOL_RUNTIME_METRICS_TLS_DIR"
CACHE_DIR = "/cache"
ADAPTERS_DIR = "/adapters"
ENV_GROUP = "LORAPOOL_GROUP"
MODELS_DIR = "/models"
PVC_ROOT = "/pvc"
USAGE_DIR = "/usage"
USAGE_SIZE_LIMIT = "1Gi"
"""More than four times what a runtime keeps at most, since a file is written again next to the old one."""
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

Manifest = dict[str, Any]


def children_name(base_name: str) -> str:
    """Returns the name that all children of a base have."""
    return f"{base_name}-runtime"


def adapters_claim_name(base_name: str) -> str:
    """Returns the name of the claim for the files of a base's adapters, which the nodes of a group share."""
    return f"{base_name}-adapters"


def selector_labels(base: BaseObject) -> dict[str, str]:
    """Returns the labels that only pods of this very object have, not those of a deleted one of the same name."""
    return {LABEL_BASE: base.meta.name, LABEL_BASE_UID: base.meta.uid}


def replica_labels(base: BaseObject, profile: RuntimeProfile | None) -> dict[str, str]:
    """Returns the labels that one pod of each replica has: of a group, its leader."""
    leaders = {LABEL_WORKER_INDEX: "0"} if profile is not None and profile.nodes > 1 else {}
    return {**selector_labels(base), **leaders}


def selector_text(base: BaseObject, profile: RuntimeProfile | None) -> str:
    """Returns the selector as text, for status.selector of the scale subresource."""
    return ",".join(f"{key}={value}" for key, value in sorted(replica_labels(base, profile).items()))


def content_hash(manifest: Manifest) -> str:
    """Returns a short hash of the whole object, the same for equal content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def labels(base: BaseObject) -> dict[str, str]:
    return {
        LABEL_NAME: "lorapool-runtime",
        LABEL_INSTANCE: base.meta.name,
        LABEL_COMPONENT: "runtime",
        LABEL_MANAGED_BY: MANAGED_BY,
        **selector_labels(base),
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
    if image.keeps_usage:
        _keep_usage(spec)
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
            "labels": {**profile.pod_labels, **labels(base)},
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


def _keep_usage(spec: Manifest) -> None:
    """Gives the runtime a folder for its usage records, which outlives the process but not the pod."""
    [container] = spec["containers"]
    container["env"].append({"name": "LORAPOOL_RUNTIME_USAGE_DIR", "value": USAGE_DIR})
    container["volumeMounts"].append({"name": "usage", "mountPath": USAGE_DIR})
    spec["volumes"].append({"name": "usage", "emptyDir": {"sizeLimit": USAGE_SIZE_LIMIT}})


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
    cache_dir, cache_bytes = _adapter_files(base, profile)
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
        "CACHE_DIR": cache_dir,
        "CACHE_BYTES": str(cache_bytes),
        "PVC_ROOT": PVC_ROOT,
        "ENGINE": profile.engine if profile.engine != "torch" else "",
        "TENSOR_PARALLEL": str(profile.tensor_parallel) if profile.tensor_parallel > 1 else "",
        "PIPELINE_PARALLEL": str(profile.pipeline_parallel) if profile.pipeline_parallel > 1 else "",
        "THREADS": str(profile.threads) if profile.threads else "",
        "DRAIN_GRACE_S": str(profile.termination_grace_period_seconds - DRAIN_RESERVE_S),
    }
    ours: list[Manifest] = []
    if profile.nodes > 1:
        group = {"fieldRef": {"fieldPath": f"metadata.labels['{LABEL_GROUP_INDEX}']"}}
        ours.append({"name": ENV_GROUP, "valueFrom": group})  # before the variables that refer to it
    ours += [{"name": f"LORAPOOL_RUNTIME_{name}", "value": value} for name, value in values.items() if value]
    if profile.cache is not None or profile.nodes > 1:
        folder = MODELS_DIR if profile.cache is not None else f"{CACHE_DIR}/bases"
        ours.append({"name": "LORAPOOL_RUNTIME_BASE_CACHE_DIR", "value": folder})
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
    given = {item.get("name") for item in profile.env} | taken
    defaults = [item for item in _engine_env(profile) if item["name"] not in given]
    return defaults + [item for item in profile.env if item.get("name") not in taken] + ours


def _adapter_files(base: BaseObject, profile: RuntimeProfile) -> tuple[str, int]:
    """Returns the folder for the files of adapters, and how many bytes of them may be kept.

    All pods of a group have the same folder. Each replica has its own, since it deletes what it does not need.
    """
    shared, limit = profile.adapter_cache, quantity_bytes(profile.cache_size_limit)
    if shared is None:
        return f"{CACHE_DIR}/artifacts", int(limit * (1 - CACHE_RESERVE))
    if shared.pvc is not None:
        limit = claim_bytes(shared.pvc) // base.spec.scaling.max_replicas
    return f"{ADAPTERS_DIR}/{base.meta.uid}/$({ENV_GROUP})", int(limit * (1 - CACHE_RESERVE))


def claim_bytes(spec: Mapping[str, Any]) -> int:
    """Returns the size of a PersistentVolumeClaim; 0 if it asks for none that can be read."""
    try:
        return quantity_bytes(str(spec["resources"]["requests"]["storage"]))
    except (KeyError, TypeError, ValueError):
        return 0


def _engine_env(profile: RuntimeProfile) -> list[Manifest]:
    """Returns variables that the libraries of an engine read; the profile may give others in their place."""
    if profile.engine == "torch":
        return []
    found = {
        "USER": "lorapool",  # the pod's user has no entry in /etc/passwd
        "XDG_CACHE_HOME": CACHE_DIR,
        "XDG_CONFIG_HOME": "/tmp",
        "VLLM_CACHE_ROOT": "/tmp/vllm",
        "VLLM_NO_USAGE_STATS": "1",
        "TRITON_CACHE_DIR": "/tmp/triton",
    }
    if profile.tensor_parallel * profile.pipeline_parallel > 1:
        found["NCCL_DEBUG"] = "WARN"  # the log then says why GPUs cannot reach each other
    if profile.nodes > 1:
        found |= {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}  # the pod network's
    made: list[Manifest] = [{"name": name, "value": value} for name, value in found.items()]
    if profile.nodes > 1:
        made.append({"name": "VLLM_HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    return made


def _volumes(base: BaseObject, profile: RuntimeProfile) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "token", "configMap": {"name": children_name(base.meta.name)}},
        {"name": "tmp", "emptyDir": {"sizeLimit": profile.tmp_size_limit}},
        {"name": "cache", "emptyDir": {"sizeLimit": profile.cache_size_limit}},
    ]
    if profile.cache is not None:
        volumes.append({"name": "models", **_model_cache(base, profile.cache)})
    if profile.adapter_cache is not None:
        volumes.append({"name": "adapters", **_adapter_cache(base, profile.adapter_cache)})
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


def _adapter_cache(base: BaseObject, cache: AdapterCache) -> Manifest:
    if cache.pvc is not None:
        return {"persistentVolumeClaim": {"claimName": adapters_claim_name(base.meta.name)}}
    return {"hostPath": cache.host_path}


def _mounts(profile: RuntimeProfile) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "token", "mountPath": TOKEN_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_DIR},
    ]
    if profile.cache is not None:
        mounts.append({"name": "models", "mountPath": MODELS_DIR})
    if profile.adapter_cache is not None:
        mounts.append({"name": "adapters", "mountPath": ADAPTERS_DIR})
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
