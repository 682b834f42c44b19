"""Fills `observe`'s values from the books of this process. No I/O.

Called by the reconciler. Keeps two small memories of its own: when the present number of replicas was first
seen, and the summary of each adapter for its base, so that thousands need not be summed up anew each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lorapool_api.common import AdapterCondition
from lorapool_api.protocol import runtime_token, token_sha256
from lorapool_operator.decisions.blocker import gate_of
from lorapool_operator.decisions.manifests import RuntimeImage, children_name
from lorapool_operator.decisions.scale import ScaleMemory
from lorapool_operator.decisions.validity import condition, min_replicas
from lorapool_operator.effects.inspections import JudgeBook
from lorapool_operator.effects.runtime_polls import RuntimeBook
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Key, Store
from lorapool_operator.world.observed import AdapterSummary, ObservedAdapter, ObservedBase
from lorapool_operator.world.profiles import Profiles


@dataclass
class BaseMemory:
    """What is remembered of a base between two plans; losing it costs nothing but a little patience."""

    uid: str
    scale: ScaleMemory
    replicas: int | None
    woken_unix_s: float
    applied_hash: str | None = None
    apply_again: bool = False
    child_conflict: str = ""


class Observer:
    def __init__(
        self,
        store: Store,
        runtimes: RuntimeBook,
        judge: JudgeBook,
        *,
        profiles: Profiles,
        image: RuntimeImage,
        master_token: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.profiles = profiles
        self._store = store
        self._runtimes = runtimes
        self._judge = judge
        self._image = image
        self._master_token = master_token
        self._now = now
        self._bases: dict[Key, BaseMemory] = {}
        self._summaries: dict[Key, tuple[AdapterObject, BaseObject | None, AdapterSummary]] = {}

    def adapter(self, key: Key) -> ObservedAdapter | None:
        adapter = self._store.adapters.get(key.namespace, key.name)
        if adapter is None:
            return None
        base_key = adapter.base_key
        base = self._store.bases.get(base_key.namespace, base_key.name)
        parts = adapter.status.usage.parts if adapter.status.usage is not None else ()
        uid = adapter.meta.uid
        return ObservedAdapter(
            adapter=adapter,
            base=base,
            places=tuple(self._runtimes.places_of(base, uid) if base is not None else self._runtimes.holders_of(uid)),
            judgement=self._judge.result(uid),
            judging=self._judge.judging(uid),
            alias_holder=self._store.alias_holder(adapter),
            sent=self._runtimes.sent.get(uid, {}),
            lost_usage=self._runtimes.lost_usage(uid),
            gone_boots=self._runtimes.gone_boots(base, [part.boot_id for part in parts]),
        )

    def base(self, key: Key) -> ObservedBase | None:
        base = self._store.bases.get(key.namespace, key.name)
        if base is None:
            return None
        adapters = self._store.adapters_of(key)
        known = {item.meta.uid for item in adapters}
        memory = self.memory(base)
        return ObservedBase(
            base=base,
            profile=self.profiles.get(base.spec.runtime_profile),
            image=self._image,
            token_sha256=token_sha256(runtime_token(self._master_token, base.meta.uid)),
            pods=tuple(self._store.pods_of(base)),
            runtimes=tuple(self._runtimes.views_of(base)),
            deployment=self._store.deployments.get(key.namespace, children_name(key.name)),
            judgement=self._judge.result(base.meta.uid),
            judging=self._judge.judging(base.meta.uid),
            adapters=tuple(self._summary(item, base) for item in adapters),
            strays=tuple(self._runtimes.strays_of(base, known.__contains__, self._now())),
            memory=memory.scale,
            woken_unix_s=memory.woken_unix_s,
            applied_hash=memory.applied_hash,
            apply_again=memory.apply_again,
            child_conflict=memory.child_conflict,
        )

    def memory(self, base: BaseObject) -> BaseMemory:
        """Of this very object; asking for more replicas than before counts as a wake."""
        held = self._bases.get(base.key)
        if held is None or held.uid != base.meta.uid:
            # a base that a process finds awake gets the benefit of the doubt only from its pods' own times
            held = self._bases[base.key] = BaseMemory(base.meta.uid, ScaleMemory(), base.spec.replicas, 0.0)
        if base.spec.replicas != held.replicas:
            if (base.spec.replicas or 0) > (held.replicas or 0):
                held.woken_unix_s = self._now()
            held.replicas = base.spec.replicas
        return held

    def apply_all_again(self) -> None:
        """The next plan of each base applies its children whatever was applied before."""
        for memory in self._bases.values():
            memory.apply_again = True

    def forget(self, key: Key) -> None:
        self._bases.pop(key, None)
        self._summaries.pop(key, None)

    def _summary(self, adapter: AdapterObject, base: BaseObject) -> AdapterSummary:
        held = self._summaries.get(adapter.key)
        if held is not None and held[0] is adapter and held[1] is base:
            return held[2]
        ready = condition(adapter.status.conditions, AdapterCondition.READY)
        loaded = condition(adapter.status.conditions, AdapterCondition.LOADED)
        is_ready = ready is not None and ready.status == "True"
        summary = AdapterSummary(
            ready=is_ready,
            loaded=loaded is not None and loaded.status == "True",
            failed=adapter.status.failure is not None and not is_ready,
            warm_replicas=min_replicas(adapter.spec, base.spec) if is_ready and gate_of(adapter, base) is None else 0,
        )
        self._summaries[adapter.key] = (adapter, base, summary)
        return summary
