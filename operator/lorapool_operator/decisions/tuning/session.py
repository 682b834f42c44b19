"""The trainer of a base as a batch/v1 Job: its manifest, when it is started and when it is ended.

Its name is fixed, so that the API server itself keeps a base from having two. A running one is never changed: a new
profile or release counts from the next session on. Suspending and releasing it is up to the profile and to Kueue.
"""

from __future__ import annotations

from typing import Any

from lorapool_api.common import (
    LABEL_BASE,
    LABEL_COMPONENT,
    LABEL_INSTANCE,
    LABEL_MANAGED_BY,
    LABEL_NAME,
    duration_s,
)
from lorapool_operator.decisions.pods import MANAGED_BY, Manifest, pod_template
from lorapool_operator.decisions.runtime_tls import owner_reference, serve_tls
from lorapool_operator.decisions.tuning.values import TuningLimits
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.profiles import Profiles, RuntimeProfile
from lorapool_operator.world.tuning import LABEL_TRAINER, ObservedTuning

RUNTIME, TRAINER = "LORAPOOL_RUNTIME_", "LORAPOOL_TRAINER_"
SHARED = frozenset(
    {
        "MODEL",
        "REVISION",
        "BASE_LABEL",
        "DTYPE",
        "LISTEN_PORT",
        "METRICS_PORT",
        "CACHE_DIR",
        "CACHE_BYTES",
        "BASE_CACHE_DIR",
        "PVC_ROOT",
        "THREADS",
        "DRAIN_GRACE_S",
        "SOURCE_RULES_FILE",
        "CHAT_FILE",
        "POD_UID",
        "TLS_DIR",
        "LOG_LEVEL",
        "LOG_FORMAT",
        "METRICS_TLS_DIR",
        "METRICS_TOKEN_FILE",
    }
)
"""Settings of a runtime that a trainer has too, under its own prefix; others of the profile are not for it."""
BACKOFF_LIMIT = 20
"""Ends of the process before Kubernetes gives a session up; the trainer itself isolates a job that ends it."""
KEPT_S = 3600
"""An ended session can be looked at for this long."""
RESTART_S = 60.0
"""A session that failed as a whole is replaced after this time."""


def trainer_profile(base: BaseObject, profiles: Profiles) -> RuntimeProfile | None:
    """Returns the profile of a base's trainer; None if there is none of the engine torch, or not for its namespace."""
    found = profiles.get(base.spec.fine_tuning.profile or base.spec.runtime_profile)
    trains = found is not None and found.engine == "torch" and found.permits(base.meta.namespace)
    return found if trains else None


def session_name(base_name: str) -> str:
    """Returns the name of the trainer's Job."""
    return f"{base_name}-trainer"


def stop_uid(tuning: ObservedTuning, wanted: bool, now: float) -> str | None:
    """Returns the uid of the session if it is to be deleted: it has ended and another is wanted, or it is of no use."""
    session, base = tuning.session, tuning.base
    if session is None or session.meta.deleting:
        return None
    foreign = base is None or session.owner_uid != base.meta.uid
    if foreign or (session.complete and wanted):
        return session.meta.uid
    if session.failure:
        return session.meta.uid if wanted and now >= session.ended_unix_s + RESTART_S else None
    useless = not wanted and not session.ended and _idle(tuning, now)
    return session.meta.uid if useless else None


def _idle(tuning: ObservedTuning, now: float) -> bool:
    """True if the trainer has had nothing to train for `idleAfter`, or has not come up although nothing waits."""
    trainer, base = tuning.trainer, tuning.base
    if trainer is None or trainer.snapshot is None:
        return True
    current = trainer.current
    if current is None or base is None or current.idle_since_unix_s is None:
        return False
    return now >= current.idle_since_unix_s + trainer.skew_s + duration_s(base.spec.fine_tuning.idle_after)


def stop_due(tuning: ObservedTuning) -> float | None:
    """Returns when an idle trainer is to end, or a failed session to be replaced; None if time changes nothing."""
    trainer, base, session = tuning.trainer, tuning.base, tuning.session
    if session is not None and session.failure:
        return session.ended_unix_s + RESTART_S
    current = trainer.current if trainer is not None else None
    if trainer is None or current is None or base is None or current.idle_since_unix_s is None:
        return None
    return current.idle_since_unix_s + trainer.skew_s + duration_s(base.spec.fine_tuning.idle_after)


def children(
    tuning: ObservedTuning, base: BaseObject, profile: RuntimeProfile, limits: TuningLimits
) -> tuple[Manifest, ...]:
    """Returns what a session consists of: what its pod may reach comes before the pod."""
    job = session(tuning, base, profile, limits)
    if not profile.network_policy:
        return (job,)
    rules = {"podSelector": {"matchLabels": _selector(base)}, "policyTypes": ["Ingress", "Egress"]}
    metadata = {key: job["metadata"][key] for key in ("name", "namespace", "ownerReferences")}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {**metadata, "labels": _labels(base)},
        "spec": {**rules, **profile.network_policy},
    }
    return policy, job


def session(tuning: ObservedTuning, base: BaseObject, profile: RuntimeProfile, limits: TuningLimits) -> Manifest:
    """Returns the Job: one pod, replaced only once it has ended, below serving in priority."""
    labels = _labels(base)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": session_name(base.meta.name),
            "namespace": base.meta.namespace,
            "labels": {**profile.trainer.job_labels, **labels},
            "ownerReferences": [{**owner_reference(base), "controller": True}],
        },
        "spec": {
            "suspend": profile.trainer.suspend,
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": BACKOFF_LIMIT,
            "podReplacementPolicy": "Failed",
            "ttlSecondsAfterFinished": KEPT_S,
            "template": _template(tuning, base, profile, limits),
        },
    }


def _template(tuning: ObservedTuning, base: BaseObject, profile: RuntimeProfile, limits: TuningLimits) -> Manifest:
    """Returns the template of a runtime's pod with the trainer in it."""
    template = pod_template(base, profile, tuning.image)
    if tuning.tls:
        serve_tls(template["spec"], base)
    annotations = template["metadata"]["annotations"]
    annotations["kubectl.kubernetes.io/default-container"] = "trainer"
    template["metadata"]["labels"] = {**profile.pod_labels, **_labels(base)}
    pod = template["spec"]
    pod["restartPolicy"] = "OnFailure"  # in place, so that the base's files need not be fetched again
    priority = profile.trainer.priority_class_name or limits.priority_class or profile.priority_class_name
    pod.update({"priorityClassName": priority} if priority else {})
    container = next(item for item in pod["containers"] if item["name"] == "runtime")
    container["name"] = "trainer"
    container["command"] = ["python", "-m", "lorapool_trainer", "serve"]
    container["env"] = _env(container["env"], base)
    return template


def _env(runtime: list[Manifest], base: BaseObject) -> list[Manifest]:
    """Returns the environment of a runtime with the settings of a trainer in place of the runtime's own."""
    tuning = base.spec.fine_tuning
    own = {
        "MAX_RANK": tuning.max_rank or base.spec.lora.max_rank,
        "MAX_JOBS": tuning.max_jobs,
        "TOKENS_PER_CYCLE": tuning.tokens_per_cycle,
        "IDLE_AFTER_S": f"{duration_s(tuning.idle_after):g}",
    }
    kept = [item for item in runtime if not item["name"].startswith(RUNTIME)]
    shared = [
        {**item, "name": TRAINER + item["name"].removeprefix(RUNTIME)}
        for item in runtime
        if item["name"].startswith(RUNTIME) and item["name"].removeprefix(RUNTIME) in SHARED
    ]
    return [*kept, *shared, *({"name": TRAINER + name, "value": str(value)} for name, value in own.items())]


def _labels(base: BaseObject) -> dict[str, Any]:
    """The labels of the Job and its pod; the selectors of the base's runtimes match none of them."""
    return {
        LABEL_NAME: "lorapool-trainer",
        LABEL_INSTANCE: base.meta.name,
        LABEL_COMPONENT: "trainer",
        LABEL_MANAGED_BY: MANAGED_BY,
        **_selector(base),
    }


def _selector(base: BaseObject) -> dict[str, str]:
    return {LABEL_BASE: base.meta.name, LABEL_TRAINER: base.meta.uid}
