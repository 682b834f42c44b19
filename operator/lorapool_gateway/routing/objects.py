"""Kubernetes objects parsed into the fields that requests need. Pure.

Two equal values mean that nothing has changed that a request could notice, so a status write that only counts usage
does not rebuild the tables. An object that cannot be parsed raises ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from lorapool_api.basemodel import KIND as BASE_KIND
from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.common import LABEL_BASE, LABEL_BASE_UID, AdapterCondition, BaseCondition, Reason, duration_s
from lorapool_api.loraadapter import FailureStatus, LoraAdapterSpec, LoraAdapterStatus
from lorapool_api.pod_address import runtime_port, server_name, url_of
from lorapool_api.protocol import AdapterState, RuntimeSnapshot, Tier
from lorapool_api.trust.ownership import POD_OWNERS, Owned
from lorapool_api.tuning.finetunejob import ANNOTATION_JOB

_NO_POD_REASONS = frozenset(
    {
        Reason.PROFILE_NOT_FOUND,
        Reason.PROFILE_NOT_PERMITTED,
        Reason.INVALID_PROFILE,
        Reason.GPU_COUNT_MISMATCH,
        Reason.SHARED_MEMORY_TOO_SMALL,
        Reason.ADAPTERS_NOT_SHARED,
        Reason.LEADER_WORKER_SET_MISSING,
        Reason.NAME_CONFLICT,
    }
)
"""With these, a base has no pods, and waking it changes nothing."""


class ObjectRef(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class BaseRoute:
    ref: ObjectRef
    uid: str
    created_unix_s: float
    spec: BaseModelSpec = field(repr=False)
    max_wait_s: float
    max_queued: int
    obstacle: str = ""
    """Why no pod of the base could start: its source or its profile cannot be used. Empty: nothing is known of it."""
    failed_start: str = ""
    """Reason of the last failed start; empty if none failed since a replica served."""
    next_start_unix_s: float = 0.0
    """The operator asks that the base is not started again before this time."""
    extra_name: str | None = None
    """The additional model name that the operator granted."""

    @property
    def names_in(self) -> str:
        """The namespace in which its model names are unique."""
        return self.ref.namespace

    @property
    def desired_replicas(self) -> int:
        """The number that the scale subresource asks for; the minimum when it is not set."""
        replicas = self.spec.replicas
        return replicas if replicas is not None else self.spec.scaling.min_replicas

    def admits(self, namespace: str) -> bool:
        """Whether adapters of this namespace may use the base."""
        return namespace == self.ref.namespace or namespace in self.spec.access.namespaces


@dataclass(frozen=True, slots=True)
class AdapterRoute:
    ref: ObjectRef
    uid: str
    created_unix_s: float
    base_ref: ObjectRef
    spec: LoraAdapterSpec = field(repr=False)
    status_is_current: bool
    """The status was written for the present spec."""
    ready: bool
    digest: str | None
    revision: str | None
    source_uri: str | None
    """The source that `digest` was resolved from; differs from the spec's while a new source is being checked."""
    awaiting_runtime: bool
    failure: FailureStatus | None
    message: str
    preferred_replicas: int = 1
    """The first k replicas of the adapter's placement order share its requests."""
    extra_name: str | None = None
    """The additional model name that the operator granted."""
    tuned: bool = False
    """A FineTuneJob made it."""

    @property
    def names_in(self) -> str:
        """The namespace of its base, whose owner's models have unique names."""
        return self.base_ref.namespace


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A runtime pod of a base."""

    base_ref: ObjectRef
    base_uid: str
    """Uid of the BaseModel that owns the pod."""
    pod_uid: str
    pod_name: str
    url: str
    """http://… or https://…, as the pod serves."""
    ready: bool
    terminating: bool

    @property
    def server_name(self) -> str:
        """The name that its certificate must have, if it serves TLS."""
        return server_name(self.base_uid)


@dataclass(frozen=True, slots=True)
class RuntimePod:
    """A pod with the labels of a runtime; whether it is one, its owners show."""

    owned: Owned
    endpoint: Endpoint
    """`base_ref` and `base_uid` are what the labels say."""


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """The fields of a runtime's last snapshot that are needed to pick a replica."""

    boot_id: str
    ready: bool
    draining: bool
    in_flight: int
    loaded: frozenset[tuple[str, str]]
    """(uid, digest) of the adapters that answer without a load."""


def base_route(raw: Mapping[str, Any]) -> BaseRoute:
    metadata = raw["metadata"]
    spec = BaseModelSpec.model_validate(raw.get("spec") or {})
    start = ((raw.get("status") or {}).get("start")) or {}
    return BaseRoute(
        ref=_ref(metadata),
        uid=str(metadata["uid"]),
        created_unix_s=_unix_s(metadata),
        spec=spec,
        max_wait_s=duration_s(spec.cold_start.max_wait),
        max_queued=spec.cold_start.max_queued,
        obstacle=_obstacle(raw),
        failed_start=str(start.get("reason") or ""),
        next_start_unix_s=unix_s(start.get("retryAt")),
        extra_name=_granted(spec.served_name, (raw.get("status") or {}).get("servedName")),
    )


def _granted(claimed: str | None, granted: str | None) -> str | None:
    """The additional name, which counts while the operator's status says that the object has it."""
    return claimed if claimed == granted and "/" not in (claimed or "") else None


def _obstacle(raw: Mapping[str, Any]) -> str:
    """The message of the condition that keeps every pod of a base from starting; empty if its status is outdated."""
    status = BaseModelStatus.model_validate(raw.get("status") or {})
    if (status.observed_generation or 0) < int(raw["metadata"].get("generation", 0)):
        return ""
    blocking = (
        condition.message
        for condition in status.conditions
        if condition.status == "False"
        and (condition.type == BaseCondition.SOURCE_RESOLVED or condition.reason in _NO_POD_REASONS)
    )
    return next(blocking, "")


def adapter_route(raw: Mapping[str, Any]) -> AdapterRoute:
    metadata = raw["metadata"]
    spec = LoraAdapterSpec.model_validate(raw.get("spec") or {})
    status = LoraAdapterStatus.model_validate(raw.get("status") or {})
    conditions = {condition.type: condition for condition in status.conditions}
    ready = conditions.get(AdapterCondition.READY)
    resolved = conditions.get(AdapterCondition.RESOLVED)
    return AdapterRoute(
        ref=_ref(metadata),
        uid=str(metadata["uid"]),
        created_unix_s=_unix_s(metadata),
        base_ref=ObjectRef(spec.base_model_ref.namespace or metadata["namespace"], spec.base_model_ref.name),
        spec=spec,
        status_is_current=status.observed_generation is not None
        and status.observed_generation >= int(metadata.get("generation", 0)),
        ready=ready is not None and ready.status == "True",
        digest=status.digest,
        revision=status.revision,
        source_uri=status.source_uri,
        awaiting_runtime=resolved is not None and resolved.reason == Reason.AWAITING_RUNTIME,
        failure=status.failure,
        message=ready.message if ready is not None else "",
        preferred_replicas=status.placement.k if status.placement is not None else 1,
        extra_name=_granted(spec.alias, status.alias),
        tuned=ANNOTATION_JOB in (metadata.get("annotations") or {}),
    )


def runtime_pod(raw: Mapping[str, Any]) -> RuntimePod | None:
    """Parses a pod with the labels of a runtime; None while it has no address, or once it has ended."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    labels = metadata.get("labels") or {}
    host, (scheme, port) = str(status.get("podIP") or ""), runtime_port(raw.get("spec") or {})
    if not host or not port or status.get("phase") in ("Succeeded", "Failed"):
        return None
    ready = any(item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions") or ())
    endpoint = Endpoint(
        base_ref=ObjectRef(str(metadata["namespace"]), str(labels.get(LABEL_BASE, ""))),
        base_uid=str(labels.get(LABEL_BASE_UID, "")),
        pod_uid=str(metadata["uid"]),
        pod_name=str(metadata["name"]),
        url=url_of(scheme, host, port),
        ready=ready,
        terminating=metadata.get("deletionTimestamp") is not None,
    )
    return RuntimePod(Owned.parse(metadata, *POD_OWNERS), endpoint)


def pod_owner(raw: Mapping[str, Any]) -> Owned:
    """Parses a ReplicaSet with its Deployment's uid, or a StatefulSet with that of its LeaderWorkerSet."""
    return Owned.parse(raw["metadata"], "Deployment", "LeaderWorkerSet")


def workload(raw: Mapping[str, Any]) -> Owned:
    """Parses a Deployment or LeaderWorkerSet with its BaseModel's uid."""
    return Owned.parse(raw["metadata"], BASE_KIND)


def runtime_state(snapshot: RuntimeSnapshot, before: RuntimeState | None = None) -> RuntimeState:
    """The state that a snapshot describes; a snapshot of changes describes the difference to the state `before`."""
    loaded = frozenset(
        (item.uid, item.digest)
        for item in snapshot.adapters
        if item.state is AdapterState.LOADED and item.tier is Tier.DEVICE
    )
    if not snapshot.full and before is not None:
        reported = {(item.uid, item.digest) for item in snapshot.adapters}
        removed = {(item.uid, item.digest) for item in snapshot.removed}
        loaded |= before.loaded - reported - removed
    return RuntimeState(
        boot_id=snapshot.boot_id,
        ready=snapshot.ready,
        draining=snapshot.draining,
        in_flight=snapshot.in_flight + snapshot.waiting,
        loaded=loaded,
    )


def _ref(metadata: Mapping[str, Any]) -> ObjectRef:
    return ObjectRef(str(metadata["namespace"]), str(metadata["name"]))


def _unix_s(metadata: Mapping[str, Any]) -> float:
    return unix_s(metadata.get("creationTimestamp"))


def unix_s(text: str | None) -> float:
    """Seconds since 1970 of an RFC 3339 time; 0 if there is none. Raises ValueError."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0
