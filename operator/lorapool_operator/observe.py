"""Gathers what is known of one object from the caches, the runtimes' reports and the inspections. No I/O.

It also remembers what a base's plans hand on to the next, and caches the summary of each adapter, so that a base with
thousands of adapters does not compute all of them again for every plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lorapool_api.common import AdapterCondition
from lorapool_api.protocol import token_sha256
from lorapool_operator.decisions.blocker import blocker_of
from lorapool_operator.decisions.manifests import children_name
from lorapool_operator.effects.inspections import InspectionTracker
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, ClusterCache, Key, find_condition
from lorapool_operator.world.observed import AdapterSummary, BaseMemory, ObservedAdapter, ObservedBase, min_replicas
from lorapool_operator.world.profiles import Profiles, RuntimeImage


class Observer:
    """Reads the caches and trackers of this process; `profiles` may be replaced while it runs."""

    def __init__(
        self,
        cache: ClusterCache,
        runtimes: RuntimeTracker,
        inspections: InspectionTracker,
        *,
        profiles: Profiles,
        image: RuntimeImage,
        tokens: Callable[[str], tuple[str, ...]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.profiles = profiles
        self._cache = cache
        self._runtimes = runtimes
        self._inspections = inspections
        self._image = image
        self._tokens = tokens
        self._now = now
        self._bases: dict[Key, BaseMemory] = {}
        self._summaries: dict[Key, tuple[AdapterObject, BaseObject | None, AdapterSummary]] = {}

    def adapter(self, key: Key) -> ObservedAdapter | None:
        """Returns all that is known of an adapter; None if it does not exist."""
        adapter = self._cache.adapters.get(key.namespace, key.name)
        if adapter is None:
            return None
        base_key = adapter.base_key
        base = self._cache.bases.get(base_key.namespace, base_key.name)
        parts = adapter.status.usage.parts if adapter.status.usage is not None else ()
        uid = adapter.meta.uid
        return ObservedAdapter(
            adapter=adapter,
            base=base,
            replicas=tuple(
                self._runtimes.replicas_of(base, uid) if base is not None else self._runtimes.holders_of(uid)
            ),
            inspection=self._inspections.result(uid),
            running=self._inspections.running(uid),
            alias_holder=self._cache.alias_holder(adapter),
            registered=self._runtimes.registered(uid),
            lost_usage=self._runtimes.lost_usage(uid),
            gone_boot_ids=self._runtimes.gone_boot_ids(base, [part.boot_id for part in parts]),
        )

    def base(self, key: Key) -> ObservedBase | None:
        """Returns all that is known of a base; None if it does not exist."""
        base = self._cache.bases.get(key.namespace, key.name)
        if base is None:
            return None
        adapters = self._cache.adapters_of(key)
        known = {item.meta.uid for item in adapters}
        memory = self.memory(base)
        return ObservedBase(
            base=base,
            profile=self.profiles.get(base.spec.runtime_profile),
            image=self._image,
            token_sha256=tuple(token_sha256(token) for token in self._tokens(base.meta.uid)),
            pods=tuple(self._cache.pods_of(base)),
            runtimes=tuple(self._runtimes.views_of(base)),
            deployment=self._cache.deployments.get(key.namespace, children_name(key.name)),
            inspection=self._inspections.result(base.meta.uid),
            running=self._inspections.running(base.meta.uid),
            adapters=tuple(self._summary(item, base) for item in adapters),
            strays=tuple(self._runtimes.strays_of(base, known.__contains__, self._now())),
            memory=memory.scale,
            woken_unix_s=memory.woken_unix_s,
            applied_hash=memory.applied_hash,
            apply_again=memory.apply_again,
            child_conflict=memory.child_conflict,
        )

    def memory(self, base: BaseObject) -> BaseMemory:
        """Returns the memory of this very object, updated with the number of replicas that its spec asks for."""
        memory = self._bases.get(base.key)
        if memory is None or memory.uid != base.meta.uid:
            # a base that already runs when this process starts is not treated as woken: its pods' own times count
            memory = self._bases[base.key] = BaseMemory(base.meta.uid, base.spec.replicas)
        memory.observe_replicas(base.spec.replicas, self._now())
        return memory

    def apply_all_again(self) -> None:
        """Makes the next plan of each base apply its children even if they are unchanged."""
        for memory in self._bases.values():
            memory.apply_again = True

    def forget(self, key: Key) -> None:
        """Drops what is remembered of a deleted object."""
        self._bases.pop(key, None)
        self._summaries.pop(key, None)

    def _summary(self, adapter: AdapterObject, base: BaseObject) -> AdapterSummary:
        cached = self._summaries.get(adapter.key)
        if cached is not None and cached[0] is adapter and cached[1] is base:
            return cached[2]
        ready = find_condition(adapter.status.conditions, AdapterCondition.READY)
        loaded = find_condition(adapter.status.conditions, AdapterCondition.LOADED)
        is_ready = ready is not None and ready.status == "True"
        summary = AdapterSummary(
            ready=is_ready,
            loaded=loaded is not None and loaded.status == "True",
            failed=adapter.status.failure is not None and not is_ready,
            warm_replicas=min_replicas(adapter.spec, base.spec)
            if is_ready and blocker_of(adapter, base) is None
            else 0,
        )
        self._summaries[adapter.key] = (adapter, base, summary)
        return summary
