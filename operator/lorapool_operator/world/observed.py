"""Gathers what is known of one object into one value for its plan. No I/O, changes nothing.

Called by the reconciler for each dirty key. Everything a plan may look at is a field here, so that a plan's
test can state the whole world in one literal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorapool_api.common import AdapterKey
from lorapool_api.loraadapter import UsagePart
from lorapool_api.protocol import AdapterDescriptor
from lorapool_operator.decisions.manifests import RuntimeImage
from lorapool_operator.decisions.plan import AdapterAt, Judgement, Judging, RuntimeView
from lorapool_operator.decisions.scale import ScaleMemory
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, DeploymentObject, Key, PodObject
from lorapool_operator.world.profiles import RuntimeProfile


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What plans need of the operator's settings."""

    pending_status_s: float = 5.0
    usage_interval_s: float = 60.0
    counts_interval_s: float = 2.0
    retry_min_s: float = 5.0
    retry_max_s: float = 300.0
    start_allowance_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class ObservedAdapter:
    """The world as one LoraAdapter sees it."""

    adapter: AdapterObject
    base: BaseObject | None
    places: tuple[AdapterAt, ...] = ()
    """Every runtime of the base, with what it reports of this adapter."""
    judgement: Judgement | None = None
    judging: Judging | None = None
    alias_holder: Key | None = None
    sent: Mapping[tuple[str, str], AdapterDescriptor] = field(default_factory=dict)
    """(boot id, digest) → descriptor this process registered there last."""
    lost_usage: tuple[UsagePart, ...] = ()
    """Last reports of runtimes that are gone, or that forgot the adapter, not yet folded."""
    gone_boots: frozenset[str] = frozenset()
    """Runtime processes that status still keeps a share of and that will not report again."""


@dataclass(frozen=True, slots=True)
class StrayReport:
    """A runtime reports an adapter that no known object stands for."""

    pod_uid: str
    pod: str
    adapter: AdapterKey
    display: str
    since_unix_s: float
    """When it was first noticed."""


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What a base needs to know of one of its adapters."""

    ready: bool
    loaded: bool
    failed: bool
    warm_replicas: int
    """minReplicas of an adapter that is served; keeps that many replicas of the base up."""


@dataclass(frozen=True, slots=True)
class ObservedBase:
    """The world as one BaseModel sees it."""

    base: BaseObject
    profile: RuntimeProfile | None
    image: RuntimeImage
    token_sha256: str
    pods: tuple[PodObject, ...] = ()
    runtimes: tuple[RuntimeView, ...] = ()
    deployment: DeploymentObject | None = None
    judgement: Judgement | None = None
    judging: Judging | None = None
    adapters: tuple[AdapterSummary, ...] = ()
    strays: tuple[StrayReport, ...] = ()
    memory: ScaleMemory = field(default_factory=ScaleMemory)
    woken_unix_s: float = 0.0
    """When this process first saw the present number of replicas asked for."""
    applied_hash: str | None = None
    """Of the children applied last by this process."""
    apply_again: bool = False
    """The resync asks for an apply even if nothing changed here, to undo foreign edits."""
    child_conflict: str = ""
    """Why the last apply was refused: a child's name is taken by someone else's object."""
