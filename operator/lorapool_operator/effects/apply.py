"""Spends a plan: the only place where a decision becomes a call.

Called by the reconciler. Decides nothing; a call that fails raises, and the key comes back with its back-off.
The answer of a status write goes into the store at once, so that the next plan sees its own effect.
"""

from __future__ import annotations

import logging
import time

from lorapool_operator.decisions.plan import Note, Unregister
from lorapool_operator.decisions.plan_adapter import AdapterPlan
from lorapool_operator.decisions.plan_base import BasePlan
from lorapool_operator.effects.cluster import Cluster, Conflict, Fenced, NotFound, NotOurs, Subject
from lorapool_operator.effects.inspections import JudgeBook
from lorapool_operator.effects.runtime_polls import RuntimeBook, RuntimeCallError
from lorapool_operator.observe import BaseMemory
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Kind, Store
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.observed import ObservedAdapter

log = logging.getLogger(__name__)


class Applier:
    def __init__(self, cluster: Cluster, store: Store, intake: Intake, runtimes: RuntimeBook, judge: JudgeBook) -> None:
        self._cluster = cluster
        self._intake = intake
        self._store = store
        self._runtimes = runtimes
        self._judge = judge

    async def adapter(self, seen: ObservedAdapter, plan: AdapterPlan) -> None:
        """Status first: it is what others act on. Raises ClusterError, RuntimeCallError."""
        adapter = seen.adapter
        if plan.judge is not None:
            self._judge.start(plan.judge)
        if plan.status is not None:
            try:
                raw = await self._cluster.patch_status(adapter, plan.status.dump())
            except NotFound:
                return
            self._intake.wrote_adapter(raw)
            self._runtimes.forget_lost(adapter.meta.uid, seen.lost_usage)
        failures: list[RuntimeCallError] = []
        for item in plan.registers:
            try:
                await self._runtimes.register(item.pod_uid, item.adapter, item.descriptor)
            except RuntimeCallError as error:
                failures.append(error)
        failures += await self._unregister(plan.unregisters)
        await self._post(_subject(Kind.ADAPTER, adapter), plan.notes)
        if failures:
            raise failures[0]

    async def base(self, base: BaseObject, plan: BasePlan, memory: BaseMemory) -> bool:
        """True when the plan's own effect asks for another plan. Raises ClusterError, RuntimeCallError."""
        conflict_before = memory.child_conflict
        memory.scale = plan.memory
        if plan.judge is not None:
            self._judge.start(plan.judge)
        if plan.scale_to is not None:
            # first and alone: when a gateway wakes the base at this moment it wins, and no pod was stopped yet
            await self._cluster.scale(base, plan.scale_to)
            await self._post(_subject(Kind.BASE, base), plan.notes)
            return False
        if plan.remove_deployment_uid is not None:
            await self._remove_deployment(base, plan.remove_deployment_uid)
        if plan.children:
            await self._apply_children(plan, memory)
        if plan.status is not None:
            try:
                raw = await self._cluster.patch_status(base, plan.status.dump())
            except NotFound:
                return False
            self._store.bases.put(BaseObject.parse(raw))
            base = self._store.bases.get(base.meta.namespace, base.meta.name) or base
        failures = await self._unregister(plan.unregisters)
        await self._post(_subject(Kind.BASE, base), plan.notes)
        if failures:
            raise failures[0]
        return memory.child_conflict != conflict_before

    async def _apply_children(self, plan: BasePlan, memory: BaseMemory) -> None:
        conflict = ""
        for child in plan.children:
            try:
                await self._cluster.apply_child(child)
            except NotOurs as error:
                conflict = str(error)
        memory.child_conflict = conflict
        memory.applied_hash = plan.children_hash
        memory.apply_again = False

    async def _remove_deployment(self, base: BaseObject, uid: str) -> None:
        held = next((item for item in self._store.deployments if item.meta.uid == uid), None)
        if held is not None:
            await self._cluster.delete("Deployment", held.meta.namespace, held.meta.name, uid=uid)

    async def _unregister(self, items: tuple[Unregister, ...]) -> list[RuntimeCallError]:
        failures: list[RuntimeCallError] = []
        for item in items:
            if item.verify and await self._exists(item):
                continue
            try:
                answer = await self._runtimes.unregister(item.pod_uid, item.adapter)
            except RuntimeCallError as error:
                failures.append(error)
                continue
            if answer is not None:
                log.info(
                    "adapter taken off a runtime",
                    extra={"adapter": item.display, "replica": item.pod, "freed_bytes": answer.freed_device_bytes},
                )
        return failures

    async def _exists(self, item: Unregister) -> bool:
        """Whether the object behind a report that we never saw exists after all, or cannot be asked for."""
        namespace, _, name = item.display.partition("/")
        try:
            raw = await self._cluster.get(Kind.ADAPTER, namespace, name)
        except NotFound:
            return False
        return bool(raw["metadata"]["uid"] == item.adapter.uid)

    async def _post(self, subject: Subject, notes: tuple[Note, ...]) -> None:
        """Events are a courtesy: one that cannot be posted is logged and not tried again."""
        for note in notes:
            try:
                await self._cluster.post_event(subject, note, time.time())
            except Fenced:
                raise
            except Conflict as error:
                log.warning(
                    "event not posted", extra={"object": f"{subject.namespace}/{subject.name}", "error": str(error)}
                )


def _subject(kind: Kind, item: BaseObject | AdapterObject) -> Subject:
    return Subject(kind, item.meta.namespace, item.meta.name, item.meta.uid, item.meta.resource_version)
