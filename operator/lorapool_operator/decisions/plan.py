"""The values that plans are made of: the settings they depend on, and the actions they contain. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from lorapool_api.basemodel import BaseModelStatus
from lorapool_api.common import AdapterKey
from lorapool_api.loraadapter import LoraAdapterStatus
from lorapool_api.protocol import AdapterDescriptor
from lorapool_artifacts.policy import Rights
from lorapool_operator.decisions.pods import Manifest
from lorapool_operator.world.cluster_cache import Key, WorkloadObject
from lorapool_operator.world.observed import ScaleMemory, SpreadMemory, Standing

ConditionValue = tuple[str, str, str]
"""(status, reason, message) of one condition."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """The part of the operator's settings that plans depend on; each is documented there."""

    pending_status_s: float = 5.0
    usage_interval_s: float = 60.0
    load_status_interval_s: float = 10.0
    retry_min_s: float = 5.0
    retry_max_s: float = 300.0
    source_check_s: float = 3600.0
    source_poll_s: float = 300.0
    start_allowance_s: float = 600.0
    start_retry_min_s: float = 60.0
    start_retry_max_s: float = 1800.0
    max_concurrent_rollouts: int = 1


@dataclass(frozen=True, slots=True)
class InspectionJob:
    """An inspection of a source to be started."""

    key: Key
    uid: str
    fingerprint: str
    attempt: int
    uri: str
    revision: str | None
    digest: str | None
    """The expected digest; any other one is a DigestMismatch."""
    base_uid: str | None
    """The base that an adapter is checked against; None for a base itself."""
    max_rank: int
    via_pod_uid: str | None = None
    """The runtime that reads the source where the operator cannot."""
    rights: Rights = Rights.SHARED
    """Whose credentials the source is read with."""


@dataclass(frozen=True, slots=True)
class Register:
    """PUT of an adapter to a runtime."""

    pod_uid: str
    pod: str
    adapter: AdapterKey
    descriptor: AdapterDescriptor


@dataclass(frozen=True, slots=True)
class Unregister:
    """DELETE of an adapter from a runtime."""

    pod_uid: str
    pod: str
    adapter: AdapterKey
    display: str
    verify: bool = False
    """True if the API server must confirm first that the object is gone: it may only be missing from the cache."""


class KubeEventType(StrEnum):
    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True, slots=True)
class KubeEvent:
    """One Kubernetes Event to be posted."""

    type: KubeEventType
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The actions that one LoraAdapter needs now."""

    status: LoraAdapterStatus | None = None
    """The status to be written; None if it is unchanged."""
    registers: tuple[Register, ...] = ()
    unregisters: tuple[Unregister, ...] = ()
    inspect: InspectionJob | None = None
    events: tuple[KubeEvent, ...] = ()
    memory: SpreadMemory = field(default_factory=SpreadMemory)
    load_writes_until_unix_s: float = 0.0
    """`ObservedAdapter.load_writes_until_unix_s` of the next plan."""
    requeue_at: float | None = None


@dataclass(frozen=True, slots=True)
class BasePlan:
    """The actions that one BaseModel needs now."""

    status: BaseModelStatus | None = None
    """The status to be written; None if it is unchanged."""
    children: tuple[Manifest, ...] = ()
    """The children to be applied."""
    children_hash: str = ""
    remove: tuple[WorkloadObject, ...] = ()
    """What makes pods and must not any more: a Deployment or LeaderWorkerSet of a deleted BaseModel of the same name,
    whose selector is immutable, or one of the kind that the base had before its profile changed."""
    scale_to: int | None = None
    read_refusals: tuple[str, ...] = ()
    """Uids of StatefulSets that lack pods: why the API server refuses them is to be read."""
    unregisters: tuple[Unregister, ...] = ()
    inspect: InspectionJob | None = None
    events: tuple[KubeEvent, ...] = ()
    memory: ScaleMemory = field(default_factory=ScaleMemory)
    begins_rollout: bool = False
    """The children replace pods from now on."""
    standing: Standing = field(default_factory=Standing)
    """The part that other bases' plans depend on."""
    deletion_costs: tuple[tuple[str, str], ...] = ()
    """(pod, value of its annotation), to be written before the number of replicas is lowered."""
    requeue_at: float | None = None
