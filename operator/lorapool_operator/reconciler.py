"""The reconcile loop: each dirty key is observed, planned and applied.

There are many workers, but a key is at only one of them at a time. A failure is logged here, once, and the key is due
again after its back-off. A plan may name a time at which the key is due again by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from lorapool_api.common import AdapterKey
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.decisions.plan_adapter import plan_adapter
from lorapool_operator.decisions.plan_base import plan_base
from lorapool_operator.decisions.plan_unreadable import plan_unreadable
from lorapool_operator.effects.apply import Applier
from lorapool_operator.effects.cluster import ClusterError, ObjectConflictError
from lorapool_operator.effects.fence import FencedError
from lorapool_operator.effects.inspections import InspectionTracker
from lorapool_operator.effects.runtime_calls import RuntimeCallError
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.metrics import Metrics
from lorapool_operator.observe import Observer
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import Key, ObjectKind
from lorapool_operator.world.intake import Intake

log = logging.getLogger(__name__)

CONFLICT_DELAY_S = 0.3
"""Another client changed the object; the watch event of the change is on its way."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the work on one key ended."""

    name: Literal["done", "conflict", "error"]
    retry_after_s: float = 0.0
    """The least wait before an error is tried again."""


class Reconciler:
    """The workers; the queue hands them the keys."""

    def __init__(
        self,
        queue: WorkQueue[Key],
        observer: Observer,
        applier: Applier,
        intake: Intake,
        runtimes: RuntimeTracker,
        inspections: InspectionTracker,
        metrics: Metrics,
        settings: PlanSettings,
        turn: Callable[[], Awaitable[None]],
    ) -> None:
        """`turn()` waits until the event loop has time for one more plan."""
        self._queue = queue
        self._observer = observer
        self._applier = applier
        self._intake = intake
        self._runtimes = runtimes
        self._inspections = inspections
        self._metrics = metrics
        self._settings = settings
        self._turn = turn

    async def work(self, workers: int) -> None:
        """Runs until cancelled. Raises an ExceptionGroup of FencedError once this process may not write any more."""
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(self._worker(), name=f"worker {number}")

    async def _worker(self) -> None:
        while True:
            key = await self._queue.get()
            await self._turn()
            began = time.monotonic()
            outcome = Outcome("error")
            try:
                outcome = await self._one(key)
            finally:
                self._queue.done(key, failed=outcome.name == "error", wait_s=outcome.retry_after_s)
                self._metrics.reconciled(key.kind, outcome.name, time.monotonic() - began)
            await asyncio.sleep(0)  # a plan without a call never waits

    async def _one(self, key: Key) -> Outcome:
        try:
            requeue_at = await self._reconcile(key)
        except FencedError:
            raise
        except ObjectConflictError as error:
            log.info("object changed meanwhile", extra={"object": str(key), "error": str(error)})
            self._queue.add(key, CONFLICT_DELAY_S)
            return Outcome("conflict")
        except (ClusterError, RuntimeCallError) as error:
            log.warning("plan not applied", extra={"kind": key.kind.value, "object": str(key), "error": str(error)})
            return Outcome("error", error.retry_after_s if isinstance(error, ClusterError) else 0.0)
        except Exception:
            log.exception("reconcile failed", extra={"kind": key.kind.value, "object": str(key)})
            return Outcome("error")
        if requeue_at is not None:
            self._queue.add(key, max(0.05, requeue_at - time.time()))
        return Outcome("done")

    async def _reconcile(self, key: Key) -> float | None:
        unreadable = self._observer.unreadable(key)
        if unreadable is not None:
            plan = plan_unreadable(unreadable, time.time())
            if plan is not None:
                await self._applier.unreadable(key, unreadable, plan)
            return None
        return await (self._base(key) if key.kind is ObjectKind.BASE else self._adapter(key))

    async def _adapter(self, key: Key) -> float | None:
        failure = await self._unregister_deleted(key)
        observed = self._observer.adapter(key)
        requeue_at: float | None = None
        if observed is not None and (
            observed.base is not None or not self._observer.may_exist(observed.adapter.base_key)
        ):
            plan = plan_adapter(observed, time.time(), self._settings)
            self._observer.keep_spread(observed.adapter.meta.uid, plan.memory)
            self._observer.keep_load_writes(observed.adapter.meta.uid, plan.load_writes_until_unix_s)
            await self._applier.adapter(observed, plan)
            requeue_at = plan.requeue_at
        if failure is not None:  # a runtime that refuses does not hold up the plan of a new object of the same name
            raise failure
        return requeue_at

    async def _base(self, key: Key) -> float | None:
        await self._observer.prepare(key, self._turn)
        observed = self._observer.base(key)
        if observed is None:
            self._observer.forget_base(key)
            return None
        for adapter in observed.moved:
            self._queue.add(adapter)
        plan = plan_base(observed, time.time(), self._settings)
        idle = self._observer.keep_standing(key, plan.standing)
        if idle is not None:
            self._queue.add(idle)
        if plan.begins_rollout:
            self._observer.rollout_begins(key)  # before the first wait, so that no other base begins meanwhile
        if await self._applier.base(observed.base, plan, self._observer.memory(observed.base)):
            return time.time()
        return plan.requeue_at

    async def _unregister_deleted(self, key: Key) -> RuntimeCallError | None:
        """Unregisters the deleted objects of this name from all runtimes. Returns the failure of one that refused."""
        failed: RuntimeCallError | None = None
        for uid in self._intake.deleted_adapters(key):
            failure = await self._unregister_everywhere(uid)
            self._inspections.forget(uid)
            self._observer.forget_adapter(uid)
            if failure is None:
                self._runtimes.forget_adapter(uid)
                self._intake.forget_deleted(key, uid)
            failed = failure or failed
        return failed

    async def _unregister_everywhere(self, uid: str) -> RuntimeCallError | None:
        failed: RuntimeCallError | None = None
        for replica in self._runtimes.holders_of(uid):
            for report in replica.reports if replica.runtime.current is not None else ():
                try:
                    await self._runtimes.unregister(replica.runtime.pod_uid, AdapterKey(uid, report.digest))
                except RuntimeCallError as error:
                    failed = error
        return failed
