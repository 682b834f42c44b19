"""Snapshots from all trainers by long-poll, with the proof, the TLS and the rules for silence of runtimes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from lorapool_api.trust.poll_proof import ProofError
from lorapool_api.tuning.trainer_protocol import ROUTE_TRAINER, JobReport, PutJobAnswer, TrainerJob, TrainerSnapshot
from lorapool_operator.effects.runtime_calls import RuntimeCallError, RuntimeClient, RuntimeGoneError
from lorapool_operator.effects.runtime_polls import BACKOFF_MAX_S, BACKOFF_MIN_S, PollSettings, clock_skew
from lorapool_operator.world.cluster_cache import ClusterCache, Key, PodObject
from lorapool_operator.world.tuning import TrainerView, TuningCache

log = logging.getLogger(__name__)


@dataclass
class _Polled:
    pod: PodObject
    task: asyncio.Task[None] | None = None
    snapshot: TrainerSnapshot | None = None
    failing_since: float | None = None
    """Monotonic time; None while polls succeed."""
    stale_reported: bool = False
    skew_s: float = 0.0


class TrainerTracker:
    """Owns the polls of trainers. Belongs to one event loop."""

    def __init__(
        self,
        cluster: ClusterCache,
        tuning: TuningCache,
        client: RuntimeClient,
        settings: PollSettings,
        *,
        changed: Callable[[Key], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`changed(base)` is called when a trainer reports something new, or nothing for too long."""
        self._cluster = cluster
        self._tuning = tuning
        self._client = client
        self._settings = settings
        self._changed = changed
        self._clock = clock
        self._polled: dict[str, _Polled] = {}

    def follow_pods(self) -> None:
        """Starts and stops polls so that they match the pods in the cache."""
        wanted = {pod.meta.uid: pod for pod in self._tuning.trainer_pods(self._cluster) if pod.ip and pod.port}
        for uid, pod in wanted.items():
            polled = self._polled.get(uid)
            if polled is not None and (polled.pod.ip, polled.pod.port) == (pod.ip, pod.port):
                polled.pod = pod
                continue
            self._forget(uid)  # another process, which has to prove itself again
            polled = self._polled[uid] = _Polled(pod)
            polled.task = asyncio.create_task(self._poll(polled), name=f"poll trainer {pod.meta.name}")
        for uid in [uid for uid in self._polled if uid not in wanted]:
            self._forget(uid)

    def view(self, base: Key) -> TrainerView | None:
        """Returns the trainer of a base: the pod that answers, or else any that exists."""
        pods = [pod for pod in self._tuning.trainer_pods(self._cluster) if pod.base == base]
        views = [self._view(pod) for pod in pods]
        return max(views, key=lambda view: (view.current is not None, not view.pod.terminating), default=None)

    def _view(self, pod: PodObject) -> TrainerView:
        polled = self._polled.get(pod.meta.uid)
        if polled is None:
            return TrainerView(pod, None, fresh=False)
        return TrainerView(pod, polled.snapshot, self._fresh(polled), polled.skew_s)

    def _fresh(self, polled: _Polled) -> bool:
        if polled.snapshot is None or polled.failing_since is None:
            return polled.snapshot is not None
        return self._clock() - polled.failing_since < (self._settings.stale_s if polled.pod.ready else 0.0)

    async def put(self, pod_uid: str, uid: str, job: TrainerJob) -> PutJobAnswer:
        """Sends a job, whose report counts at once. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        answer = await self._client.put_job(self._proven(pod_uid), uid, job)
        self._answered(pod_uid, answer.boot_id, uid, answer.job)
        return answer

    async def delete(self, pod_uid: str, uid: str) -> None:
        """Has a trainer forget a job, at once. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        pod, snapshot = self._proven(pod_uid), self._polled[pod_uid].snapshot
        await self._client.delete_job(pod, uid)
        self._answered(pod_uid, snapshot.boot_id if snapshot is not None else "", uid, None)

    async def close(self) -> None:
        """Stops all polls."""
        tasks = [polled.task for polled in self._polled.values() if polled.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._polled.clear()
        await self._client.close()

    def _proven(self, pod_uid: str) -> PodObject:
        """Returns the pod, which may be sent the token. Raises RuntimeGoneError."""
        polled = self._polled.get(pod_uid)
        if polled is None or polled.snapshot is None:
            raise RuntimeGoneError(f"trainer pod {pod_uid} is gone, or has not proved to be one of its base")
        return polled.pod

    def _answered(self, pod_uid: str, boot_id: str, uid: str, report: JobReport | None) -> None:
        """Takes what a call answered about a job into the snapshot, since the next plan may be made before the next
        poll is answered."""
        polled = self._polled.get(pod_uid)
        if polled is None or polled.snapshot is None or polled.snapshot.boot_id != boot_id:
            return
        others = [item for item in polled.snapshot.jobs if item.uid != uid]
        jobs = others if report is None else [*others, report]
        polled.snapshot = polled.snapshot.model_copy(update={"jobs": jobs})

    def _forget(self, uid: str) -> None:
        polled = self._polled.pop(uid, None)
        if polled is not None and polled.task is not None:
            polled.task.cancel()

    async def _poll(self, polled: _Polled) -> None:
        settings, backoff_s = self._settings, BACKOFF_MIN_S
        while True:
            query = {"wait": "0"}
            if polled.snapshot is not None and polled.failing_since is None:
                query = {
                    "after": str(polled.snapshot.seq),
                    "boot": polled.snapshot.boot_id,
                    "wait": f"{settings.wait_s:g}",
                }
            try:
                limit_s = settings.wait_s + settings.timeout_s
                raw = await self._client.snapshot(polled.pod, query, timeout_s=limit_s, route=ROUTE_TRAINER)
                self._arrived(polled, TrainerSnapshot.model_validate_json(raw))
                backoff_s = BACKOFF_MIN_S
                await asyncio.sleep(settings.pause_s)
            except (RuntimeCallError, ProofError, ValidationError) as error:
                self._failed(polled, error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)

    def _arrived(self, polled: _Polled, snapshot: TrainerSnapshot) -> None:
        before, recovered = polled.snapshot, polled.failing_since is not None
        polled.snapshot, polled.failing_since, polled.stale_reported = snapshot, None, False
        polled.skew_s = clock_skew(polled.skew_s, time.time() - snapshot.now_unix_s)
        if recovered or before is None or (before.boot_id, before.seq) != (snapshot.boot_id, snapshot.seq):
            self._changed(polled.pod.base)

    def _failed(self, polled: _Polled, error: Exception) -> None:
        if polled.failing_since is None:
            polled.failing_since = self._clock()
            log.info("trainer does not answer", extra={"replica": polled.pod.meta.name, "error": str(error)[:200]})
        if not polled.stale_reported and not self._fresh(polled):
            polled.stale_reported = True
            self._changed(polled.pod.base)
