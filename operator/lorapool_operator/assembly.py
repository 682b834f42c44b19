"""Puts together what observes, plans and applies: the same for the operator's process and for `make serve`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lorapool_api.common import AdapterCondition, FailureReason, Reason
from lorapool_api.store_protocol import StoreAccess
from lorapool_api.trust.tls import ReleaseTrust
from lorapool_artifacts.policy import SourcePolicy
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.effects.apply import Applier
from lorapool_operator.effects.authority import Authority
from lorapool_operator.effects.certificates import Certificates
from lorapool_operator.effects.cluster import PlanTarget
from lorapool_operator.effects.fence import Fence
from lorapool_operator.effects.inspections import InspectionTracker, Inspector
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker
from lorapool_operator.effects.source_access import CredentialDelivery, SourceAccess
from lorapool_operator.effects.tuning import TuningControl
from lorapool_operator.metrics import Metrics
from lorapool_operator.observe import Observer
from lorapool_operator.reconciler import Reconciler
from lorapool_operator.slices import Slices
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, ClusterCache, Key, find_condition
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.observed import min_replicas
from lorapool_operator.world.profiles import Images, Profiles

LOAD_DELAY_S = 1.0
"""A busy runtime reports a change with every request; its base is then planned at most once a second."""


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """The settings of all parts; each is documented in the operator's settings."""

    tokens: Callable[[str], tuple[str, ...]]
    """The bearer tokens of a base's runtimes, by the base's uid, in the order in which to try them."""
    images: Images
    profiles: Profiles
    inspections: int
    inspection_timeout_s: float
    counts_interval_s: float
    usage_delay_s: float
    """How long after a report that only counted something its adapter is planned."""
    policy: SourcePolicy = field(default_factory=SourcePolicy)
    """Which sources each namespace may use."""
    namespace_credentials: str = ""
    """Name of the Secret with a namespace's own credentials; empty: none is read."""
    store: Callable[[str], StoreAccess | None] = lambda _namespace: None
    """How a namespace reads its objects in the release's store; None: there is no store."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    polls: PollSettings = field(default_factory=PollSettings)
    authority: Authority | None = None
    """Issues the certificates of runtimes; None: new pods serve without TLS."""
    trust: ReleaseTrust = field(default_factory=ReleaseTrust)
    """The authorities whose certificates of runtimes are trusted."""


class Control:
    """The caches, the queue, and the parts between them. Belongs to one event loop."""

    def __init__(
        self,
        target: PlanTarget,
        inspector: Inspector,
        settings: ControlSettings,
        metrics: Metrics,
        *,
        fence: Fence | None = None,
    ) -> None:
        self.cache = ClusterCache()
        self.queue: WorkQueue[Key] = WorkQueue()
        self.slices = Slices()
        self.tuning: TuningControl | None = None
        """Fine-tuning, where the process sets it up."""
        self._usage_delay_s = settings.usage_delay_s
        self.access = SourceAccess(
            settings.policy,
            read=lambda namespace, name: target.get("Secret", namespace, name),
            secret=settings.namespace_credentials,
            store=settings.store,
        )
        self.runtimes = RuntimeTracker(
            self.cache,
            tokens=settings.tokens,
            settings=settings.polls,
            changed=self._runtime_changed,
            turn=self.slices.turn,
            fence=fence,
            trust=settings.trust,
        )
        self.delivery = CredentialDelivery(self.cache, self.runtimes, self.access)
        self.inspections = InspectionTracker(
            self.cache,
            inspector,
            self.runtimes,
            concurrency=settings.inspections,
            timeout_s=settings.inspection_timeout_s,
            changed=self.queue.add,
            pending_status_s=settings.plan.pending_status_s,
            access=self.access,
        )
        self.intake = Intake(
            self.cache,
            self._dirty,
            counts_interval_s=settings.counts_interval_s,
            pods_changed=self._pods_changed,
        )
        self.observer = Observer(
            self.cache,
            self.runtimes,
            self.inspections,
            profiles=settings.profiles,
            images=settings.images,
            tokens=settings.tokens,
            access=self.access,
            serves_tls=settings.authority is not None,
        )
        issued = Certificates(target, self.cache, settings.authority) if settings.authority is not None else None
        self.reconciler = Reconciler(
            self.queue,
            self.observer,
            Applier(target, self.cache, self.intake, self.runtimes, self.inspections, issued),
            self.intake,
            self.runtimes,
            self.inspections,
            metrics,
            settings.plan,
            self.slices.turn,
        )

    def mark_all(self, spread_s: float) -> None:
        """Marks every object dirty: bases at once, adapters evenly spread over `spread_s`."""
        for base in self.cache.bases:
            self.queue.add(base.key)
        for number, adapter in enumerate(self.cache.adapters):
            self.queue.add(adapter.key, spread_s * number / len(self.cache.adapters))

    def credentials_changed(self) -> None:
        """Has the sources that refused access inspected again."""
        self.observer.credentials_unix_s = time.time()
        for item in (*self.cache.bases, *self.cache.adapters):
            if any(entry.reason == FailureReason.UNAUTHORIZED for entry in item.status.conditions):
                self.queue.add(item.key)

    async def close(self) -> None:
        """Ends all inspections and polls."""
        if self.tuning is not None:
            await self.tuning.close()
        await self.inspections.close()
        await self.runtimes.close()

    def _dirty(self, key: Key, delay_s: float) -> None:
        self.queue.add(key, delay_s)
        if self.tuning is not None:
            self.tuning.intake.touched(key, delay_s)

    def _pods_changed(self) -> None:
        self.runtimes.follow_pods()
        if self.tuning is not None:
            self.tuning.trainers.follow_pods()

    def _runtime_changed(self, base: Key, adapter_uids: Iterable[str], *, urgent: bool, serving: bool) -> None:
        """Marks dirty what a runtime's report affects: at once for conditions, later for counters."""
        self.queue.add(base, 0.0 if urgent else LOAD_DELAY_S)
        reported = set(adapter_uids)
        if not reported and not serving:
            return
        delay_s = 0.0 if urgent else self._usage_delay_s
        owner = self.cache.bases.get(base.namespace, base.name)
        soon = set() if urgent or owner is None else self._may_spread(owner, reported)
        for uid in reported:
            adapter = self.cache.adapter_of(uid)
            if adapter is not None and adapter.base_key == base:
                self.queue.add(adapter.key, LOAD_DELAY_S if uid in soon else delay_s)
        for adapter in self.cache.adapters_of(base) if serving and owner is not None else ():
            if owner is not None and adapter.meta.uid not in reported and _needs_runtime(adapter, owner):
                self.queue.add(adapter.key, delay_s)

    def _may_spread(self, base: BaseObject, adapter_uids: set[str]) -> set[str]:
        """Returns the adapters whose number of preferred replicas may have to change with their load."""
        if base.spec.scaling.max_replicas == 1:
            return set()
        return self.runtimes.busy(base.key, adapter_uids, 1 + base.spec.scaling.target_in_flight // 2)


def _needs_runtime(adapter: AdapterObject, base: BaseObject) -> bool:
    """True if the plan may change with the runtimes that serve, also of an adapter that none of them reports."""
    progressing = find_condition(adapter.status.conditions, AdapterCondition.PROGRESSING)
    return (
        min_replicas(adapter.spec, base.spec) > 0
        or adapter.status.state != Reason.PARKED
        or (progressing is not None and progressing.status == "True")
    )
