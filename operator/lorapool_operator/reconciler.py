"""The loop: a dirty key is observed, planned, applied. Four lines each; what differs by kind is elsewhere.

Called by `__main__`. Many workers, but one key only once at a time. A failure is logged once, here, and the key
comes back; a success may name a time to come back by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time

from lorapool_api.common import AdapterKey
from lorapool_operator.decisions.plan_adapter import plan_adapter
from lorapool_operator.decisions.plan_base import plan_base
from lorapool_operator.effects.apply import Applier
from lorapool_operator.effects.cluster import ClusterError, Conflict, Fenced
from lorapool_operator.effects.inspections import JudgeBook
from lorapool_operator.effects.runtime_polls import RuntimeBook, RuntimeCallError
from lorapool_operator.metrics import Metrics
from lorapool_operator.observe import Observer
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import Key, Kind
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.observed import PlanSettings

log = logging.getLogger(__name__)

CONFLICT_DELAY_S = 0.3
"""Someone else was quicker; its event is on the way to us."""


class Reconciler:
    def __init__(
        self,
        queue: WorkQueue[Key],
        observer: Observer,
        applier: Applier,
        intake: Intake,
        runtimes: RuntimeBook,
        judge: JudgeBook,
        metrics: Metrics,
        settings: PlanSettings,
    ) -> None:
        self._queue = queue
        self._observer = observer
        self._applier = applier
        self._intake = intake
        self._runtimes = runtimes
        self._judge = judge
        self._metrics = metrics
        self._settings = settings

    async def work(self, workers: int) -> None:
        """Runs until cancelled, or until this process may not write any more (then raises Fenced)."""
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(self._worker(), name=f"worker {number}")

    async def _worker(self) -> None:
        while True:
            key = await self._queue.get()
            began = time.monotonic()
            outcome = "error"
            try:
                outcome = await self._one(key)
            finally:
                self._queue.done(key, failed=outcome == "error")
                self._metrics.reconciled(key.kind, outcome, time.monotonic() - began)

    async def _one(self, key: Key) -> str:
        try:
            requeue_at = await (self._base(key) if key.kind is Kind.BASE else self._adapter(key))
        except Fenced:
            raise
        except Conflict as error:
            log.info("overtaken", extra={"object": str(key), "error": str(error)})
            self._queue.add(key, CONFLICT_DELAY_S)
            return "conflict"
        except (ClusterError, RuntimeCallError) as error:
            log.warning("not applied", extra={"kind": key.kind.value, "object": str(key), "error": str(error)})
            return "error"
        except Exception:
            log.exception("reconcile failed", extra={"kind": key.kind.value, "object": str(key)})
            return "error"
        if requeue_at is not None:
            self._queue.add(key, max(0.05, requeue_at - time.time()))
        return "done"

    async def _adapter(self, key: Key) -> float | None:
        await self._adapters_gone(key)
        seen = self._observer.adapter(key)
        if seen is None:
            self._observer.forget(key)
            return None
        plan = plan_adapter(seen, time.time(), self._settings)
        await self._applier.adapter(seen, plan)
        return plan.requeue_at

    async def _base(self, key: Key) -> float | None:
        seen = self._observer.base(key)
        if seen is None:
            self._observer.forget(key)
            return None
        plan = plan_base(seen, time.time(), self._settings)
        if await self._applier.base(seen.base, plan, self._observer.memory(seen.base)):
            return time.time()
        return plan.requeue_at

    async def _adapters_gone(self, key: Key) -> None:
        """Objects of this name that were deleted leave every runtime."""
        for uid in sorted(self._intake.gone.get(key, ())):
            for place in self._runtimes.holders_of(uid):
                for report in place.reports:
                    if place.runtime.believed is not None:
                        await self._runtimes.unregister(place.runtime.pod_uid, AdapterKey(uid, report.digest))
            self._runtimes.forget_adapter(uid)
            self._judge.forget(uid)
            self._intake.gone.get(key, set()).discard(uid)
        if not self._intake.gone.get(key):
            self._intake.gone.pop(key, None)
