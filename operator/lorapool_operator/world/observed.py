"""What is known of one BaseModel or LoraAdapter when its plan is made. Values only.

Everything that a plan depends on is a field here, so that the test of a plan states the whole world in one literal.
Facts that follow from the fields are computed once, as cached properties.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lorapool_api.base_modules import BaseModules
from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.chat import chat_hash
from lorapool_api.common import AdapterKey, FailureReason, Reason
from lorapool_api.loraadapter import LoraAdapterSpec, UsagePart
from lorapool_api.placement import Replica, placement_order
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, AdapterState, Preload, RuntimeSnapshot
from lorapool_artifacts.policy import Permission, Rights, SourceRules
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Key, PodObject, WorkloadObject, uid_hash
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile

# --- runtimes ----------------------------------------------------------------------------


@dataclass(frozen=True)  # no slots: they leave no room for cached properties
class RuntimeView:
    """One runtime pod: its state in Kubernetes, and the snapshot that the runtime itself reported."""

    pod: str
    pod_uid: str
    ready: bool
    """The pod's Ready condition."""
    terminating: bool
    snapshot: RuntimeSnapshot | None
    """The latest one, however old."""
    fresh: bool
    """True if the latest poll succeeded, or polls have failed only for a moment."""
    token_refused: bool = False
    """The runtime's last answer was that the operator's token is not valid."""
    distrust: str = ""
    """Why the certificate that it served last is refused; empty if it is trusted."""
    skew_s: float = 0.0
    """The operator's clock minus the runtime's."""

    @cached_property
    def current(self) -> RuntimeSnapshot | None:
        """The snapshot if it describes the present: it is fresh and the pod is not terminating."""
        return self.snapshot if self.fresh and not self.terminating else None

    @cached_property
    def has_free_slot(self) -> bool:
        now = self.current
        return now is not None and now.slots_used < now.slots_total

    def local_time(self, unix_s: float | None) -> float:
        """Converts a time that the runtime reported to the operator's clock; 0 if there is none."""
        return unix_s + self.skew_s if unix_s is not None else 0.0

    @cached_property
    def serving(self) -> bool:
        """True if the runtime accepts requests and adapters now."""
        now = self.current
        return now is not None and now.ready and not now.draining and self.ready


@dataclass(frozen=True, slots=True)
class SpreadMemory:
    """The state that one decision about an adapter's preferred replicas passes to the next."""

    high_since_unix_s: float | None = None
    """Since when more replicas than now would have been needed."""
    low_since_unix_s: float | None = None
    """Since when fewer replicas than now would have been enough."""


@dataclass(frozen=True, slots=True)
class AdapterOnReplica:
    """The reports of one runtime about one adapter: one for each digest, usually one."""

    runtime: RuntimeView
    reports: tuple[AdapterReport, ...]

    @property
    def last_used_unix_s(self) -> float:
        """When a request for the adapter last ended here, on the operator's clock; 0 for never."""
        return max((self.runtime.local_time(report.last_used_unix_s) for report in self.reports), default=0.0)

    def holds(self, digest: str) -> bool:
        """True if the runtime answers and has these files loaded."""
        report = self.report(digest)
        return self.runtime.current is not None and report is not None and report.state is AdapterState.LOADED

    def report(self, digest: str | None) -> AdapterReport | None:
        if not self.reports:  # as on nearly all replicas
            return None
        return next((item for item in self.reports if item.digest == digest), None)


@dataclass(frozen=True, slots=True)
class StrayReport:
    """A runtime's report of an adapter for which no object is known."""

    pod_uid: str
    pod: str
    adapter: AdapterKey
    display: str
    since_unix_s: float
    """When it was first noticed."""


# --- inspections of sources --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A source that was found: its identity and the contents of its headers."""

    digest: str
    revision: str | None
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
    size_bytes: int | None = None
    weights_digest: str | None = None
    """Of an adapter's weights and their config alone; None where an inspection did not find it."""


@dataclass(frozen=True, slots=True)
class SourceFailure:
    """The reason why a source cannot be used."""

    reason: FailureReason
    message: str
    retry_after_s: float | None = None
    """The wait that the source itself asked for."""


@dataclass(frozen=True, slots=True)
class InspectionResult:
    """One finished inspection."""

    fingerprint: str
    """Hash of everything that the result depends on; it is void for an object with another fingerprint."""
    attempt: int
    outcome: SourceFacts | SourceFailure
    at_unix_s: float
    jitter: float
    """A random number in [0, 1) that spreads retries over time."""
    began_unix_s: float = 0.0
    """When it began, and used the credentials of that time."""


@dataclass(frozen=True, slots=True)
class RunningInspection:
    """An inspection that was requested and has not finished."""

    fingerprint: str
    running_since_unix_s: float | None
    """None while it is queued."""


# --- one adapter -------------------------------------------------------------------------


@dataclass(frozen=True)  # no slots: they leave no room for cached properties
class ObservedAdapter:
    """A LoraAdapter and everything that is known of it."""

    adapter: AdapterObject
    base: BaseObject | None
    replicas: tuple[AdapterOnReplica, ...] = ()
    """Every runtime of the base, with its reports of this adapter."""
    inspection: InspectionResult | None = None
    running: RunningInspection | None = None
    name_holder: Key | None = None
    """The object that has this one's alias, if any."""
    since_unix_s: float | None = None
    """When this process began to observe: what is done at intervals is not due at once after a restart. None for a
    process that does nothing at intervals."""
    base_unreadable: bool = False
    """True if the base exists but this version cannot parse it."""
    registered: Mapping[tuple[str, str], AdapterDescriptor] = field(default_factory=dict)
    """(boot id, digest) → the descriptor that this process registered there last."""
    lost_usage: tuple[UsagePart, ...] = ()
    """Last counts of runtimes that are gone or forgot the adapter, which the status does not contain yet."""
    gone_boot_ids: frozenset[str] = frozenset()
    """Runtime processes that have a share in the status and will not report again."""
    allowed_pins: frozenset[str] | None = None
    """Uids of the pods on which it may be pinned; None: on all."""
    spread_memory: SpreadMemory = field(default_factory=SpreadMemory)
    leaving: frozenset[str] = frozenset()
    """Uids of pods that are about to be stopped or replaced."""
    credentials_unix_s: float = 0.0
    """When the credentials with which this process inspects sources changed last; 0 for never."""
    load_writes_until_unix_s: float = 0.0
    """When the writes of its load state that were made are paid for, at one in each interval; 0 for none."""
    source_rules: SourceRules | None = None
    """The rules for the sources of the base; None: every one may be used with the shared rights."""

    @cached_property
    def fingerprint(self) -> str | None:
        """The hash of everything that an inspection depends on; None without a base."""
        return adapter_fingerprint(self.adapter, self.base, self.permission.rights) if self.base is not None else None

    @cached_property
    def permission(self) -> Permission:
        """Whether the namespace may use the source, and with whose rights that is read."""
        return self._permission_of(self.adapter.spec.source.uri)

    @cached_property
    def record_holds(self) -> bool:
        """True if the status records a result of this base's weights, and its source may still be used as it was."""
        if self.base is None:
            return True
        found = self._permission_of(self.adapter.status.source_uri or self.adapter.spec.source.uri)
        origin = (self.adapter.recorded_fingerprint or "").partition("/")[0]
        return not found.refused and origin == fingerprint_origin(self.base, found.rights)

    def _permission_of(self, uri: str) -> Permission:
        rules = self.source_rules
        return rules.permission(self.adapter.meta.namespace, uri) if rules is not None else Permission()

    @cached_property
    def runtime_reads_source(self) -> bool:
        """True if only a runtime can inspect the source."""
        return self.base is not None and runtime_reads_source(self.adapter, self.base)

    @cached_property
    def awaits_runtime(self) -> bool:
        """True if only a runtime can inspect the source and none serves."""
        return self.runtime_reads_source and not self.serving

    @cached_property
    def serving(self) -> int:
        """The number of replicas that serve."""
        return sum(item.runtime.serving for item in self.replicas)

    @cached_property
    def holders(self) -> tuple[AdapterOnReplica, ...]:
        """The replicas that report the adapter: few of many."""
        return tuple(item for item in self.replicas if item.reports)

    @cached_property
    def serving_pod_uids(self) -> tuple[str, ...]:
        """The replicas that serve, in the adapter's placement order: the preferred ones come first.

        The order takes a hash for each replica; `serving` is their number without it.
        """
        serving = [Replica(item.runtime.pod_uid) for item in self.replicas if item.runtime.serving]
        return tuple(placement_order(self.adapter.meta.uid, serving))

    @cached_property
    def min_replicas(self) -> int:
        """On how many replicas the adapter stays loaded; 0 without a base."""
        return min_replicas(self.adapter.spec, self.base.spec) if self.base is not None else 0

    @cached_property
    def pinned_pod_uids(self) -> tuple[str, ...]:
        """The serving replicas on which it is pinned: the preferred ones, as far as the base's owner allows."""
        wanted = self.serving_pod_uids[: self.min_replicas] if self.min_replicas else ()
        return tuple(uid for uid in wanted if self.allowed_pins is None or uid in self.allowed_pins)

    @cached_property
    def silent(self) -> bool:
        """True while a ready replica does not answer, also before its first report: its load and state are unknown."""
        views = [item.runtime for item in self.replicas]
        return any(view.ready and not view.terminating and view.current is None for view in views)

    @property
    def preferred_replicas(self) -> int:
        """The number of preferred replicas that the status publishes."""
        placement = self.adapter.status.placement
        return placement.k if placement is not None else 1

    @cached_property
    def requests(self) -> int:
        """Its running and waiting requests on all replicas that answer."""
        current = [item for item in self.holders if item.runtime.current is not None]
        return sum(report.in_flight + report.waiting for item in current for report in item.reports)


UNCHECKED = "?"
"""Ends the fingerprint of an inspection without the base, whose modules are not known yet."""


def unchecked(fingerprint: str | None) -> bool:
    """True for a result that says nothing of the adapter's base."""
    return fingerprint is not None and UNCHECKED in fingerprint


def fingerprint_origin(base: BaseObject, rights: Rights) -> str:
    """Returns what a result is void without: the same weights of the base, and the same rights to the source."""
    origin = uid_hash(base.meta.uid)
    return origin if rights is Rights.SHARED else f"{origin}~own"


def adapter_fingerprint(adapter: AdapterObject, base: BaseObject, rights: Rights = Rights.SHARED) -> str:
    """Returns the hash of all an inspection depends on, after its origin."""
    source = adapter.spec.source
    parts = [source.uri, source.revision or "", source.digest or "", adapter.meta.retry or ""]
    by_runtime = runtime_reads_source(adapter, base)
    if by_runtime:
        parts.append(str(base.spec.lora.max_rank))  # the runtime checks the rank itself
    if said := chat_hash(adapter.spec.chat_template, adapter.spec.generation):
        parts.append(said)  # a template that cannot be used is a failure which another one heals
    against = "" if by_runtime or base.status.modules is not None else UNCHECKED
    return f"{fingerprint_origin(base, rights)}/{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}{against}"


def runtime_reads_source(adapter: AdapterObject, base: BaseObject) -> bool:
    """True if only a runtime can inspect the adapter, since the source of the adapter or of its base is a volume."""
    return adapter.spec.source.uri.startswith("pvc://") or base.spec.source.uri.startswith("pvc://")


def min_replicas(spec: LoraAdapterSpec, base: BaseModelSpec) -> int:
    """Returns on how many replicas an adapter stays loaded: its own setting or the base's default."""
    wanted = spec.min_replicas if spec.min_replicas is not None else base.adapter_defaults.min_replicas
    return wanted if spec.max_replicas is None else min(wanted, spec.max_replicas)


def max_replicas(spec: LoraAdapterSpec, base: BaseModelSpec) -> int:
    """Returns over how many replicas an adapter's requests may be spread: its own setting or the base's default."""
    bound = spec.max_replicas if spec.max_replicas is not None else base.adapter_defaults.max_replicas
    return max(1, min_replicas(spec, base), bound if bound is not None else base.scaling.max_replicas)


# --- one base ----------------------------------------------------------------------------

REFUSED_RETRY_MIN_S = 5.0
REFUSED_RETRY_MAX_S = 300.0
"""An apply that the API server refuses is tried again after this time; the wait doubles each time."""


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """The part of an adapter's state that its base's plan depends on."""

    ready: bool
    loaded: bool
    failed: bool
    warm_replicas: int
    """How many replicas of the base an adapter that may be served keeps running."""
    pinned_replicas: int = 0
    """minReplicas of an adapter that may be served."""
    display: str = ""
    """`namespace/name`."""
    preload: Preload | None = None
    """How to load it elsewhere; None unless it is loaded."""
    preferred_replicas: int = 1
    """The number of preferred replicas that its status publishes."""
    last_used: str = ""
    """When it was last used, as RFC 3339 text; empty for never."""


@dataclass(frozen=True, slots=True)
class FailingGroup:
    """The last group of a base whose other groups serve, after it has failed."""

    index: int
    failures: int
    """In a row."""
    failed_unix_s: float
    retry_unix_s: float
    """It is not started again before."""


@dataclass(frozen=True, slots=True)
class ScaleMemory:
    """The state that one scaling decision passes to the next."""

    low_since_unix_s: float | None = None
    """Since when fewer replicas than now would have been enough."""
    leaving: tuple[str, ...] = ()
    """Uids of the pods that are about to be stopped."""
    leaving_since_unix_s: float | None = None
    failing: FailingGroup | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """The part of a base's plan that other bases' plans depend on."""

    lacks: frozenset[str] = frozenset()
    """Devices that no node has free for a base of which no replica serves."""
    idle_since_unix_s: float | None = None
    """Since when the base has had no request; None if it may not be scaled to zero now."""
    devices: frozenset[str] = frozenset()
    """Devices that its pods occupy."""


class ChildProblem(NamedTuple):
    """Why the API server did not accept a child of a base."""

    reason: Reason
    message: str


@dataclass
class BaseMemory:
    """The state that this process keeps of a base between two plans. Its loss only delays a scale-down."""

    uid: str
    replicas: int | None
    """spec.replicas when it was last observed."""
    scale: ScaleMemory = field(default_factory=ScaleMemory)
    woken_unix_s: float = 0.0
    """When this process first observed the present number of replicas."""
    applied_hash: str | None = None
    """Content hash of the children that this process applied last."""
    apply_again: bool = False
    """True if the children are to be applied even if unchanged, to undo edits by others."""
    child_problem: ChildProblem | None = None
    """Why the last apply was refused."""
    refusals: int = 0
    """How often in a row an apply was refused."""
    apply_retry_unix_s: float = 0.0
    """When a refused apply is tried again."""
    profile: RuntimeProfile | None = None
    """The profile that the last plan used."""
    pods_refused: str = ""
    """Why the API server refuses a pod of a group, as it was read last; empty for none."""
    refusals_read_unix_s: float = 0.0

    def observe_replicas(self, replicas: int | None, now: float) -> None:
        """Records spec.replicas; a larger number than before counts as a wake-up."""
        if (replicas or 0) > (self.replicas or 0):
            self.woken_unix_s = now
        self.replicas = replicas

    def children_applied(self, content_hash: str, problem: ChildProblem | None, now: float) -> bool:
        """Records an apply and why it was refused, if it was. Returns True if that changed."""
        changed = self.child_problem != problem
        self.applied_hash, self.child_problem, self.apply_again = content_hash, problem, False
        self.refusals = self.refusals + 1 if problem is not None else 0
        wait_s = min(REFUSED_RETRY_MAX_S, REFUSED_RETRY_MIN_S * 2.0 ** min(self.refusals - 1, 20))
        self.apply_retry_unix_s = now + wait_s if problem is not None else 0.0
        return changed


@dataclass(frozen=True, slots=True)
class ObservedBase:
    """A BaseModel and everything that is known of it."""

    base: BaseObject
    profile: RuntimeProfile | None
    image: RuntimeImage
    token_sha256: tuple[str, ...]
    """The hash of each bearer token that the runtimes accept."""
    pods: tuple[PodObject, ...] = ()
    runtimes: tuple[RuntimeView, ...] = ()
    workers: tuple[PodObject, ...] = ()
    """The pods of its groups that are not leaders."""
    short_sets: tuple[str, ...] = ()
    """Uids of the StatefulSets of its groups that lack pods."""
    pods_refused: str = ""
    """Why the API server refuses a pod of a group; empty while none is known to lack."""
    refusals_read_unix_s: float = 0.0
    """When that was read."""
    workload: WorkloadObject | None = None
    """What makes its pods, of the kind that the profile asks for; of any kind if it has no profile."""
    other_workload: WorkloadObject | None = None
    """One of the other kind, which made its pods before the profile changed."""
    inspection: InspectionResult | None = None
    running: RunningInspection | None = None
    adapters: tuple[AdapterSummary, ...] = ()
    moved: tuple[Key, ...] = ()
    """The adapters whose preferred replicas may have changed since the last plan."""
    yields_to: Key | None = None
    """The waking base for which this one, which is idle, has to give up its devices."""
    strays: tuple[StrayReport, ...] = ()
    memory: ScaleMemory = field(default_factory=ScaleMemory)
    rolling_elsewhere: tuple[str, ...] = ()
    """Other bases whose pods are being replaced."""
    woken_unix_s: float = 0.0
    """When this process first observed the present number of replicas."""
    applied_hash: str | None = None
    """Content hash of the children that this process applied last."""
    apply_again: bool = False
    """True if the children are to be applied even if unchanged, to undo edits by others."""
    child_problem: ChildProblem | None = None
    """Why the last apply was refused."""
    apply_retry_unix_s: float = 0.0
    """When a refused apply is tried again."""
    name_holder: Key | None = None
    """The object that has this one's served name, if any."""
    profile_denied: bool = False
    """True if the profile exists, but not for this namespace; `profile` is then None."""
    profiles_problem: str = ""
    """Why the changed file of profiles cannot be read; empty if nothing is wrong."""
    profile_changed: bool = False
    """True if the last plan used another profile."""
    credentials_unix_s: float = 0.0
    """When the credentials with which this process inspects sources changed last; 0 for never."""
    source_rules: SourceRules | None = None
    """The rules for the sources that its runtimes read; None: every one may be used with the shared rights."""
    modules: BaseModules | None = None
    """What adapters may name in it, if a runtime reported it to this process."""
    serves_tls: bool = False
    """True if its new pods are to serve TLS."""

    @property
    def permission(self) -> Permission:
        """Whether the namespace may use the base's source, and with whose rights that is read."""
        rules = self.source_rules
        return rules.permission(rules.owner, self.base.spec.source.uri) if rules is not None else Permission()

    @property
    def floor(self) -> int:
        """How many replicas the pinned adapters keep running."""
        return max((item.warm_replicas for item in self.adapters), default=0)

    @property
    def fingerprint(self) -> str:
        """Identifies the inspection; the source is immutable, so only the retry annotation asks for another one."""
        return f"{self.base.meta.uid}/{self.base.meta.retry or ''}"
