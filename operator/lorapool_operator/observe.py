"""Gathers what is known of one object from the caches, the runtimes' reports and the inspections. No I/O.

It also remembers what a base's plans hand on to the next, and caches the summary of each adapter, so that a base with
thousands of adapters does not compute all of them again for every plan.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from lorapool_api.common import AdapterCondition
from lorapool_api.protocol import token_sha256
from lorapool_operator.decisions.blocker import blocker_of
from lorapool_operator.decisions.pins import PinWanted, allowed_pins, kept_replicas
from lorapool_operator.decisions.pods import children_name
from lorapool_operator.decisions.scaling.hot_set import preload_of
from lorapool_operator.decisions.scaling.preemption import choose
from lorapool_operator.effects.inspections import InspectionTracker
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.effects.source_access import SourceAccess
from lorapool_operator.world.cluster_cache import (
    AdapterObject,
    BaseObject,
    ClusterCache,
    Key,
    UnreadableObject,
    WorkloadObject,
    find_condition,
)
from lorapool_operator.world.observed import (
    AdapterSummary,
    BaseMemory,
    ObservedAdapter,
    ObservedBase,
    SpreadMemory,
    Standing,
    min_replicas,
)
from lorapool_operator.world.profiles import NO_IMAGE, Images, Profiles, RuntimeProfile

YIELD_PAUSE_S = 75.0
"""A base that waits for devices asks the next idle base only after the pods of the last one had time to end."""
ROLLOUT_SEEN_S = 15.0
"""By then the status of a Deployment or LeaderWorkerSet shows a rollout that was begun."""


@dataclass(frozen=True, slots=True)
class _Pins:
    """The pins of one base, with everything that they were computed from."""

    base: BaseObject
    wanted: tuple[PinWanted, ...]
    pods: tuple[str, ...]
    allowed: Mapping[str, frozenset[str]]


class Observer:
    """Reads the caches and trackers of this process. The process replaces what it reads from files: the profiles, their
    problem, and when the credentials changed."""

    def __init__(
        self,
        cache: ClusterCache,
        runtimes: RuntimeTracker,
        inspections: InspectionTracker,
        *,
        profiles: Profiles,
        images: Images,
        tokens: Callable[[str], tuple[str, ...]],
        access: SourceAccess,
        serves_tls: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.profiles = profiles
        self.profiles_problem = ""
        """Why the changed profiles cannot be read, so that `profiles` are older; empty if nothing is wrong."""
        self.credentials_unix_s = 0.0
        """When the credentials with which sources are inspected changed last; 0 for never."""
        self._cache = cache
        self._runtimes = runtimes
        self._inspections = inspections
        self._images = images
        self._tokens = tokens
        self._access = access
        self._serves_tls = serves_tls
        self._now = now
        self._since = now()
        self._bases: dict[Key, BaseMemory] = {}
        self._terms: dict[Key, BaseObject] = {}
        self._summaries: dict[str, tuple[AdapterObject, BaseObject, AdapterSummary]] = {}
        """By the adapter's uid."""
        self._spread: dict[str, SpreadMemory] = {}
        self._load_writes: dict[str, float] = {}
        self._pins: dict[Key, _Pins] = {}
        self._pins_seen: dict[Key, _Pins] = {}
        """Those of the base's last plan; `_pins` may be newer, since the plans of adapters compute them too."""
        self._leaving: dict[Key, frozenset[str]] = {}
        self._rollouts_begun: dict[Key, float] = {}
        self._standings: dict[Key, Standing] = {}
        self._yields: dict[Key, Key] = {}
        self._asked_to_yield: dict[Key, float] = {}

    def adapter(self, key: Key) -> ObservedAdapter | None:
        """Returns all that is known of an adapter; None if it does not exist."""
        adapter = self._cache.adapters.get(key.namespace, key.name)
        if adapter is None:
            return None
        base_key = adapter.base_key
        base = self._cache.bases.get(base_key.namespace, base_key.name)
        parts = adapter.status.usage.parts if adapter.status.usage is not None else ()
        uid = adapter.meta.uid
        lost = self._runtimes.lost_usage(uid)
        counted = {part.boot_id for part in (*parts, *lost)}
        pinned = base is not None and min_replicas(adapter.spec, base.spec) > 0
        return ObservedAdapter(
            adapter=adapter,
            base=base,
            replicas=tuple(self._runtimes.replicas_of(base, uid) if base is not None else ()),
            inspection=self._inspections.result(uid),
            running=self._inspections.running(uid),
            name_holder=self._cache.name_holder(adapter),
            since_unix_s=self._since,
            base_unreadable=base is None and base_key in self._cache.unreadable,
            registered=self._runtimes.registered(uid),
            lost_usage=lost,
            gone_boot_ids=self._runtimes.gone_boot_ids(base, counted),
            allowed_pins=self._allowed_pins(base, uid) if pinned and base is not None else None,
            spread_memory=self._spread.get(uid, SpreadMemory()),
            leaving=self._leaving.get(base_key, frozenset()),
            credentials_unix_s=self.credentials_unix_s,
            load_writes_until_unix_s=self._load_writes.get(uid, 0.0),
            source_rules=self._access.rules_of(base) if base is not None else None,
        )

    def base(self, key: Key) -> ObservedBase | None:
        """Returns all that is known of a base; None if it does not exist."""
        base = self._cache.bases.get(key.namespace, key.name)
        if base is None:
            return None
        adapters = self._cache.adapters_of(key)
        known = {item.meta.uid for item in adapters}
        memory = self.memory(base)
        profile = self.profiles.get(base.spec.runtime_profile)
        denied = profile is not None and not profile.permits(key.namespace)
        profile = None if denied else profile
        before, memory.profile = memory.profile, profile
        summaries = self._summaries_of(base, adapters)
        workload, other = self._workloads(key, profile)
        return ObservedBase(
            base=base,
            profile=profile,
            profile_denied=denied,
            profiles_problem=self.profiles_problem,
            image=self._images.get(profile.engine if profile is not None else "torch", NO_IMAGE),
            token_sha256=tuple(token_sha256(token) for token in self._tokens(base.meta.uid)),
            pods=tuple(self._cache.pods_of(base)),
            runtimes=tuple(self._runtimes.views_of(base)),
            workers=tuple(self._cache.workers_of(base)),
            short_sets=(short := tuple(self._cache.short_sets_of(base, children_name(base.meta.name)))),
            pods_refused=memory.pods_refused if short else "",
            refusals_read_unix_s=memory.refusals_read_unix_s,
            workload=workload,
            other_workload=other,
            inspection=self._inspections.result(base.meta.uid),
            running=self._inspections.running(base.meta.uid),
            adapters=tuple(summaries),
            moved=self._moved(base, adapters, summaries, self._leaving_pods(base, memory)),
            yields_to=self._yields.pop(key, None),
            strays=tuple(self._runtimes.strays_of(base, known.__contains__, self._now())),
            memory=memory.scale,
            rolling_elsewhere=self._rolling_elsewhere(key),
            woken_unix_s=memory.woken_unix_s,
            applied_hash=memory.applied_hash,
            apply_again=memory.apply_again,
            child_problem=memory.child_problem,
            apply_retry_unix_s=memory.apply_retry_unix_s,
            name_holder=self._cache.name_holder(base),
            profile_changed=None not in (before, profile) and before != profile,
            credentials_unix_s=self.credentials_unix_s,
            source_rules=self._access.rules_of(base),
            modules=self._runtimes.modules_of(base),
            serves_tls=self._serves_tls,
        )

    def _workloads(
        self, key: Key, profile: RuntimeProfile | None
    ) -> tuple[WorkloadObject | None, WorkloadObject | None]:
        """Returns what makes the base's pods: of the profile's kind, and of the other one."""
        at = key.namespace, children_name(key.name)
        found = self._cache.deployments.get(*at), self._cache.leader_worker_sets.get(*at)
        groups = found[0] is None if profile is None else profile.nodes > 1
        return (found[1], found[0]) if groups else found

    def unreadable(self, key: Key) -> UnreadableObject | None:
        """Returns the newest version of an object if it cannot be parsed."""
        return self._cache.unreadable.get(key)

    def memory(self, base: BaseObject) -> BaseMemory:
        """Returns the memory of this very object, updated with the number of replicas that its spec asks for."""
        memory = self._bases.get(base.key)
        if memory is None or memory.uid != base.meta.uid:
            # a base that already runs when this process starts is not treated as woken: its pods' own times count
            memory = self._bases[base.key] = BaseMemory(base.meta.uid, base.spec.replicas)
        memory.observe_replicas(base.spec.replicas, self._now())
        return memory

    def may_exist(self, key: Key) -> bool:
        """True for an object that is missing only because its namespace was never listed."""
        return self._cache.may_exist(key)

    def keep_standing(self, key: Key, standing: Standing) -> Key | None:
        """Keeps what other bases' plans depend on. Returns an idle base that has to yield its devices to this one."""
        self._standings[key] = standing
        now = self._now()
        if not standing.lacks or now < self._asked_to_yield.get(key, 0.0) + YIELD_PAUSE_S:
            return None
        idle = choose(standing.lacks, self._standings, now)
        if idle is not None:
            self._asked_to_yield[key] = now
            self._yields[idle] = key
        return idle

    def rollout_begins(self, key: Key) -> None:
        """Counts a base's pods as being replaced until its Deployment or LeaderWorkerSet shows it."""
        self._rollouts_begun[key] = self._now()

    def _rolling_elsewhere(self, key: Key) -> tuple[str, ...]:
        oldest = self._now() - ROLLOUT_SEEN_S
        self._rollouts_begun = {base: at for base, at in self._rollouts_begun.items() if at > oldest}
        rolling = {item.base for item in self._cache.workloads() if item.rolling} | self._rollouts_begun.keys()
        return tuple(sorted(str(base) for base in rolling if base != key))

    def keep_spread(self, adapter_uid: str, memory: SpreadMemory) -> None:
        """Hands the memory of a plan to the adapter's next one."""
        if memory == SpreadMemory():
            self._spread.pop(adapter_uid, None)
        else:
            self._spread[adapter_uid] = memory

    def keep_load_writes(self, adapter_uid: str, until_unix_s: float) -> None:
        """Hands on when the writes of an adapter's load state are paid for."""
        if until_unix_s:
            self._load_writes[adapter_uid] = until_unix_s
        else:
            self._load_writes.pop(adapter_uid, None)

    def apply_all_again(self) -> None:
        """Makes the next plan of each base apply its children even if they are unchanged."""
        for memory in self._bases.values():
            memory.apply_again = True

    def forget_adapter(self, uid: str) -> None:
        """Drops what is remembered of a deleted adapter."""
        for kept in (self._summaries, self._spread, self._load_writes):
            kept.pop(uid, None)

    def forget_base(self, key: Key) -> None:
        """Drops what is remembered of a deleted base."""
        self._bases.pop(key, None)
        self._access.forget_base(key)
        for kept in (
            self._terms,
            self._pins,
            self._pins_seen,
            self._leaving,
            self._standings,
            self._yields,
            self._asked_to_yield,
        ):
            kept.pop(key, None)

    async def prepare(self, key: Key, turn: Callable[[], Awaitable[None]]) -> None:
        """Makes the summaries of a base's adapters, which `base` then finds: all of them at once would be a pause.

        `turn()` waits until the event loop has time for one more.
        """
        base = self._cache.bases.get(key.namespace, key.name)
        if base is None:
            return
        terms = self._terms_of(base)
        for adapter in self._cache.adapters_of(key):
            await turn()
            self._summary(adapter, terms)

    def _summaries_of(self, base: BaseObject, adapters: Sequence[AdapterObject]) -> list[AdapterSummary]:
        terms = self._terms_of(base)
        return [self._summary(item, terms) for item in adapters]

    def _terms_of(self, base: BaseObject) -> BaseObject:
        """Returns the first version of the base that is the same to its adapters as this one.

        A base's own status changes often, and must not cause the summaries of thousands of adapters to be made again.
        """
        known = self._terms.get(base.key)
        if known is None or _terms(known) != _terms(base):
            known = self._terms[base.key] = base
        return known

    def _summary(self, adapter: AdapterObject, base: BaseObject) -> AdapterSummary:
        cached = self._summaries.get(adapter.meta.uid)
        if cached is not None and cached[0] is adapter and cached[1] is base:
            return cached[2]
        ready = find_condition(adapter.status.conditions, AdapterCondition.READY)
        loaded = find_condition(adapter.status.conditions, AdapterCondition.LOADED)
        is_ready = ready is not None and ready.status == "True"
        is_loaded = loaded is not None and loaded.status == "True"
        pinned = min_replicas(adapter.spec, base.spec) if is_ready and blocker_of(adapter, base) is None else 0
        summary = AdapterSummary(
            ready=is_ready,
            loaded=is_loaded,
            failed=adapter.status.failure is not None and not is_ready,
            warm_replicas=kept_replicas(pinned, base.spec, guest=adapter.meta.namespace != base.meta.namespace),
            pinned_replicas=pinned,
            display=str(adapter.key),
            preload=preload_of(adapter, base) if is_loaded and blocker_of(adapter, base) is None else None,
            preferred_replicas=adapter.status.placement.k if adapter.status.placement is not None else 1,
            last_used=adapter.status.last_used or "",
        )
        self._summaries[adapter.meta.uid] = (adapter, base, summary)
        return summary

    # --- pins

    def _allowed_pins(self, base: BaseObject, adapter_uid: str) -> frozenset[str]:
        """Returns the pods of the base on which this adapter may be pinned."""
        known = self._pins.get(base.key)
        if known is None:
            adapters = self._cache.adapters_of(base.key)
            wanted = _wanted_pins(adapters, self._summaries_of(base, adapters))
        else:
            wanted = known.wanted
        return self._compute_pins(base, wanted).get(adapter_uid, frozenset())

    def _moved(
        self,
        base: BaseObject,
        adapters: Sequence[AdapterObject],
        summaries: Sequence[AdapterSummary],
        leaving: frozenset[str],
    ) -> tuple[Key, ...]:
        """Computes the pins again. Returns the adapters that the operator itself places and that may have to move."""
        known, seen = self._leaving.get(base.key, frozenset()), self._pins_seen.get(base.key)
        allowed = self._compute_pins(base, _wanted_pins(adapters, summaries))
        pins, self._leaving[base.key] = self._pins[base.key], leaving
        self._pins_seen[base.key] = pins
        if seen is None or (seen is pins and leaving == known):
            return ()
        before = seen.allowed

        def placed(item: AdapterObject, summary: AdapterSummary) -> bool:
            hot = item.status.placement is not None or (bool(leaving) and summary.loaded)
            return hot or before.get(item.meta.uid) != allowed.get(item.meta.uid)

        return tuple(item.key for item, summary in zip(adapters, summaries, strict=True) if placed(item, summary))

    def _leaving_pods(self, base: BaseObject, memory: BaseMemory) -> frozenset[str]:
        """Returns the pods that are about to be stopped, or replaced by a rollout that is under way."""
        workload, _ = self._workloads(base.key, memory.profile)
        if workload is None or not workload.rolling:
            return frozenset(memory.scale.leaving)
        old = {pod.meta.uid for pod in self._cache.pods_of(base) if pod.template_hash != workload.template_hash}
        return frozenset(memory.scale.leaving) | old

    def _compute_pins(self, base: BaseObject, wanted: tuple[PinWanted, ...]) -> Mapping[str, frozenset[str]]:
        pods = tuple(sorted(view.pod_uid for view in self._runtimes.views_of(base) if view.serving))
        known = self._pins.get(base.key)
        if known is not None and known.wanted == wanted and known.pods == pods and known.base.spec == base.spec:
            return known.allowed
        allowed = allowed_pins(wanted, pods, base.spec)
        self._pins[base.key] = _Pins(base, wanted, pods, allowed)
        return allowed


def _wanted_pins(adapters: Sequence[AdapterObject], summaries: Sequence[AdapterSummary]) -> tuple[PinWanted, ...]:
    return tuple(
        sorted(
            PinWanted(item.meta.created_unix_s, item.meta.uid, item.meta.namespace, summary.pinned_replicas)
            for item, summary in zip(adapters, summaries, strict=True)
            if summary.pinned_replicas
        )
    )


def _terms(base: BaseObject) -> tuple[object, ...]:
    """Returns the part of a base that the summaries of its adapters depend on."""
    return base.meta.uid, base.meta.deleting, base.spec.model_copy(update={"replicas": None})
