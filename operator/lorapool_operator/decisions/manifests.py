"""The children of a BaseModel as plain objects, ready for server-side apply."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence

from lorapool_api.common import ANNOTATION_SPEC_HASH, ANNOTATION_TEMPLATE_HASH, LABEL_COMPONENT
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
    adapters_claim_name,
    children_name,
    content_hash,
    labels,
    pod_template,
    replica_labels,
    selector_labels,
)
from lorapool_operator.decisions.runtime_tls import owner_reference, serve_tls
from lorapool_operator.world.cluster_cache import DEPLOYMENT, HELD_BACK, LEADER_WORKER_SET, BaseObject
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
        *cache_claims(base, profile),
        *network_policy(base, profile),  # before the pods that it is for
        workload(base, profile, image, replicas=replicas, paused=paused, tls=tls),
        service(base, profile, ENCRYPTED if tls else PLAIN),
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


def cache_claims(base: BaseObject, profile: RuntimeProfile) -> Iterator[Manifest]:
    """Yields the claims of the base's own volumes, if the profile asks for some."""
    kind = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
    if profile.cache is not None and profile.cache.pvc is not None:
        yield {**kind, "metadata": _metadata(base), "spec": profile.cache.pvc}
    if profile.adapter_cache is not None and profile.adapter_cache.pvc is not None:
        name = {"name": adapters_claim_name(base.meta.name)}
        yield {**kind, "metadata": _metadata(base) | name, "spec": profile.adapter_cache.pvc}


def network_policy(base: BaseObject, profile: RuntimeProfile) -> Iterator[Manifest]:
    """Yields the policy of the base's pods, if the profile has one; no namespace needs one of the chart's.

    Between the pods of a base with groups everything is allowed, since what computes together uses any port.
    """
    if not profile.network_policy:
        return
    pods = {"podSelector": {"matchLabels": selector_labels(base)}}
    rules = {**pods, "policyTypes": ["Ingress", "Egress"], **profile.network_policy}
    if profile.nodes > 1:
        for direction, peer in (("ingress", "from"), ("egress", "to")):
            rules[direction] = [*rules.get(direction, ()), {peer: [pods]}]
    yield {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": _metadata(base), "spec": rules}


def workload(
    base: BaseObject, profile: RuntimeProfile, image: RuntimeImage, *, replicas: int, paused: bool, tls: bool
) -> Manifest:
    """Returns what makes the pods. While it is paused, they are not replaced when the template changes."""
    template = pod_template(base, profile, image)
    worker = worker_template(template) if profile.nodes > 1 else None
    if tls:
        serve_tls(template["spec"], base)
    hashed = {"leader": template, "worker": worker, "nodes": profile.nodes} if worker is not None else template
    template["metadata"]["annotations"][ANNOTATION_TEMPLATE_HASH] = content_hash(hashed)
    if worker is None:
        return deployment(base, profile, template, replicas=replicas, paused=paused)
    return leader_worker_set(base, profile, template, worker, replicas=replicas, paused=paused)


def deployment(
    base: BaseObject, profile: RuntimeProfile, template: Manifest, *, replicas: int, paused: bool
) -> Manifest:
    """Returns the Deployment of a base whose replicas are single pods."""
    return {
        "apiVersion": "apps/v1",
        "kind": DEPLOYMENT,
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


def leader_worker_set(
    base: BaseObject, profile: RuntimeProfile, leader: Manifest, worker: Manifest, *, replicas: int, paused: bool
) -> Manifest:
    """Returns the LeaderWorkerSet of a base whose replicas are groups of pods, one on each node.

    When the process of one pod ends, its controller replaces the whole group: no part of it can continue alone.
    """
    bounds = strategy(profile).get("rollingUpdate") or {"maxUnavailable": "100%", "maxSurge": 0}
    held_back = {"partition": HELD_BACK} if paused else {}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": LEADER_WORKER_SET,
        "metadata": _metadata(base),
        "spec": {
            "replicas": replicas,
            "startupPolicy": "LeaderCreated",  # the leader is ready only once its workers have joined
            "networkConfig": {"subdomainPolicy": "UniquePerReplica"},  # else its Service would have the name of ours
            "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": {**bounds, **held_back}},
            "leaderWorkerTemplate": {
                "size": profile.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": worker,
            },
        },
    }


def worker_template(leader: Manifest) -> Manifest:
    """Returns the template of a group's other pods, which answer no requests: without ports, probes and metrics."""
    worker = copy.deepcopy(leader)
    worker["metadata"]["labels"][LABEL_COMPONENT] = "worker"
    annotations = worker["metadata"]["annotations"]
    worker["metadata"]["annotations"] = {k: v for k, v in annotations.items() if not k.startswith("prometheus.io/")}
    container = next(item for item in worker["spec"]["containers"] if item["name"] == "runtime")
    for field in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
        del container[field]
    return worker


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
    """Returns the hash of the pod template among these children; empty if no child makes pods."""
    templates = (
        child["spec"]["template"]
        if child["kind"] == DEPLOYMENT
        else child["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
        for child in made
        if child["kind"] in (DEPLOYMENT, LEADER_WORKER_SET)
    )
    return next((str(item["metadata"]["annotations"][ANNOTATION_TEMPLATE_HASH]) for item in templates), "")


def service(base: BaseObject, profile: RuntimeProfile, scheme: str = PLAIN) -> Manifest:
    """Returns a headless Service, by which monitoring and other clients find the pods; the gateway reads the pods."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(base),
        "spec": {
            "clusterIP": "None",
            "selector": replica_labels(base, profile),
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
