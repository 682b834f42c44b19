"""The children of a BaseModel as plain objects, ready for server-side apply."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from lorapool_api.common import ANNOTATION_SPEC_HASH, ANNOTATION_TEMPLATE_HASH
from lorapool_api.pod_address import ENCRYPTED, PLAIN
from lorapool_api.protocol import RUNTIME_PORT, BaseChat, PreloadList
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.pods import (
    CHAT_FILE,
    METRICS_PORT,
    METRICS_PORT_NAME,
    PRELOAD_FILE,
    SOURCE_RULES_FILE,
    TOKEN_HASHES_FILE,
    Manifest,
    children_name,
    content_hash,
    labels,
    pod_template,
    selector_labels,
)
from lorapool_operator.decisions.runtime_tls import owner_reference, serve_tls
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile, device_names

NO_PRELOAD = PreloadList()


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


def _metadata(base: BaseObject) -> Manifest:
    return {
        "name": children_name(base.meta.name),
        "namespace": base.meta.namespace,
        "labels": labels(base),
        "ownerReferences": [{**owner_reference(base), "controller": True}],
    }
