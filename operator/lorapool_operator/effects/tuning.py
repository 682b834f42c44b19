"""Observes, plans and applies fine-tuning, base by base, with a queue of its own: serving never waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from lorapool_api.store_protocol import StoreAccess
from lorapool_operator.decisions.plan_unreadable import plan_unreadable_job
from lorapool_operator.decisions.pods import Manifest
from lorapool_operator.decisions.tuning.plan_tuning import plan_tuning
from lorapool_operator.decisions.tuning.promotion import adapter_name
from lorapool_operator.decisions.tuning.tokens import MonthRecord, counted
from lorapool_operator.decisions.tuning.turns import counted_before
from lorapool_operator.decisions.tuning.values import JobPlan, TuningLimits, TuningPlan
from lorapool_operator.effects.cluster import (
    Cluster,
    ClusterError,
    ObjectConflictError,
    ObjectNotFoundError,
    Subject,
    merge_patch,
)
from lorapool_operator.effects.runtime_calls import RuntimeCallError, RuntimeClient
from lorapool_operator.effects.runtime_polls import PollSettings
from lorapool_operator.effects.token_record import TokenRecord
from lorapool_operator.effects.trainer_polls import TrainerTracker
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, ClusterCache, Key, Meta, ObjectKind
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile
from lorapool_operator.world.tuning import (
    DataFinding,
    ObservedJob,
    ObservedTuning,
    Sent,
    TrainerView,
    TuningCache,
    TuningObject,
)
from lorapool_operator.world.tuning_intake import TuningIntake

log = logging.getLogger(__name__)

REPORT_DELAY_S = 1.0
"""A trainer reports each step; its jobs are planned once in this time."""
COUNT_S = 1.0
"""How often the trained tokens of all jobs are added up."""
CHECKS = 4
"""Data sets that are checked at the same time."""


class FilesError(Exception):
    """The store did not do what was asked; it is tried again."""


class JobFiles(Protocol):
    """The files of jobs in the release's store."""

    async def check(self, job: TuningObject) -> DataFinding:
        """Checks the data set of a job. Never raises."""

    async def delete(self, job: Meta, *, keep_result: bool) -> None:
        """Deletes everything that was written for a job, or all but its result. Raises FilesError."""

    def access(self, job: TuningObject, initial_uri: str | None) -> StoreAccess:
        """Returns access to the files that the job's trainer reads and writes, and to no other."""


@dataclass
class _Memory:
    """What is remembered of one job, none of which a new operator needs."""

    finding: DataFinding | None = None
    checking: asyncio.Task[None] | None = None
    sent: Sent | None = None
    written_unix_s: float = 0.0
    publish_problem: str = ""
    publish_failed_unix_s: float = 0.0
    deleted_data: bool = False


@dataclass(frozen=True, slots=True)
class TuningSetup:
    """What the control of fine-tuning depends on."""

    image: RuntimeImage
    profile_of: Callable[[BaseObject], RuntimeProfile | None]
    """The profile of a base's trainer; None if it does not exist or is not for its namespace."""
    files: JobFiles | None
    """None: there is no store."""
    limits: TuningLimits = field(default_factory=TuningLimits)
    serves_tls: bool = False
    """New pods serve TLS, with the certificate of their base's runtimes."""
    tokens: TokenRecord | None = None
    """What the namespaces trained this month; None without a limit."""


class TuningControl:
    """The queue of bases, and the parts around it. Belongs to one event loop."""

    def __init__(
        self, cluster: Cluster, cache: ClusterCache, client: RuntimeClient, polls: PollSettings, setup: TuningSetup
    ) -> None:
        """`client` speaks to trainers; it is closed with this."""
        self.cache = TuningCache()
        self.queue: WorkQueue[Key] = WorkQueue()
        self.trainers = TrainerTracker(
            cache, self.cache, client, polls, changed=lambda base: self.queue.add(base, REPORT_DELAY_S)
        )
        self.intake = TuningIntake(self.cache, self.queue.add, pods_changed=self.trainers.follow_pods)
        self._cluster = cluster
        self._objects = cache
        self._setup = setup
        self._memory: dict[str, _Memory] = {}
        self._counted: Mapping[str, MonthRecord] = {}
        self._counted_unix_s = 0.0
        self._permits = asyncio.Semaphore(CHECKS)

    async def work(self) -> None:
        """Runs until cancelled. Raises FencedError once this process may not write any more."""
        while True:
            key = await self.queue.get()
            failed, wait_s = True, 0.0
            try:
                due = await self._one(key)
                failed = False
                if due is not None:
                    self.queue.add(key, max(0.05, due - time.time()))
            except ObjectConflictError as error:
                log.info("object changed meanwhile", extra={"object": str(key), "error": str(error)})
            except (ClusterError, RuntimeCallError, FilesError) as error:
                wait_s = error.retry_after_s if isinstance(error, ClusterError) else 0.0
                log.warning("plan not applied", extra={"kind": "FineTuneJob", "object": str(key), "error": str(error)})
            finally:
                self.queue.done(key, failed=failed, wait_s=wait_s)

    def mark_all(self) -> None:
        """Requests a plan of every base with jobs or a trainer."""
        self.trainers.follow_pods()
        for key in {job.base_key for job in self.cache.jobs} | {item.base for item in self.cache.sessions}:
            self.queue.add(key)

    async def close(self) -> None:
        """Ends all checks and polls."""
        tasks = [item.checking for item in self._memory.values() if item.checking is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.trainers.close()

    # --- observing

    def observe(self, key: Key) -> ObservedTuning:
        """Returns everything that the plan of a base's jobs depends on."""
        base = self._objects.bases.get(key.namespace, key.name)
        unfinished = [job for job in self.cache.jobs if not job.ended and not job.meta.deleting]
        return ObservedTuning(
            key=key,
            base=base,
            profile=self._setup.profile_of(base) if base is not None else None,
            image=self._setup.image,
            store=self._setup.files is not None,
            base_may_exist=self._objects.may_exist(key),
            jobs=tuple(self._observed(job) for job in self.cache.jobs_of(key)),
            session=self.cache.session_of(key),
            trainer=self.trainers.view(key),
            active_elsewhere=Counter(
                job.meta.namespace for job in unfinished if job.base_key != key and job.status.trainer is not None
            ),
            older_unfinished={
                job.meta.uid: counted_before(job, unfinished) for job in unfinished if job.base_key == key
            },
            month_tokens={name: record.tokens for name, record in self._month_records(time.time()).items()},
            tls=self._setup.serves_tls,
        )

    def _month_records(self, now: float, *, fresh: bool = False) -> Mapping[str, MonthRecord]:
        """Returns what each namespace with jobs trained this month, recorded or not; nothing without a limit.

        It is counted once in `COUNT_S`, since each plan depends on the jobs of all bases.
        """
        tokens, unlisted = self._setup.tokens, self._objects.unlisted
        if tokens is None or None in unlisted:
            return {}
        if not fresh and now < self._counted_unix_s + COUNT_S:
            return self._counted
        reported = self._reported_tokens()
        trained: dict[str, list[tuple[TuningObject, int]]] = {}
        for job in self.cache.jobs:
            if job.meta.namespace not in unlisted:  # jobs that are not known yet would look like deleted ones
                usage = job.status.usage
                total = max(usage.trained_tokens if usage is not None else 0, reported.get(job.meta.uid, 0))
                trained.setdefault(job.meta.namespace, []).append((job, total))
        unreadable = [str(item.raw["metadata"]["uid"]) for item in self.cache.unreadable.values()]
        self._counted = {name: counted(tokens.of(name), jobs, unreadable, now) for name, jobs in trained.items()}
        self._counted_unix_s = now
        return self._counted

    def _reported_tokens(self) -> dict[str, int]:
        """Returns what trainers reported last, by uid of the job: it is newer than what the status has."""
        views = [self.trainers.view(item.base) for item in self.cache.sessions]
        snapshots = [view.snapshot for view in views if view is not None and view.snapshot is not None]
        return {report.uid: report.usage.trained_tokens for found in snapshots for report in found.jobs}

    async def _record_tokens(self, *, at_once: bool = False) -> None:
        if self._setup.tokens is not None:
            now = time.time()
            await self._setup.tokens.write(self._month_records(now, fresh=at_once), now, at_once=at_once)

    def _observed(self, job: TuningObject) -> ObservedJob:
        memory, namespace = self._of(job), job.meta.namespace
        wanted = job.spec.init_from
        return ObservedJob(
            job=job,
            finding=memory.finding,
            checking=memory.checking is not None,
            sent=memory.sent,
            written_unix_s=memory.written_unix_s,
            initial=self._objects.adapters.get(namespace, wanted.name) if wanted is not None else None,
            result=self._objects.adapters.get(namespace, adapter_name(job)),
            publish_problem=memory.publish_problem,
            publish_failed_unix_s=memory.publish_failed_unix_s,
            deleted_data=memory.deleted_data,
        )

    def _of(self, job: TuningObject) -> _Memory:
        return self._memory.setdefault(job.meta.uid, _Memory())

    # --- applying

    async def _one(self, key: Key) -> float | None:
        if key.kind is ObjectKind.TUNING:
            await self._report_unreadable(key)
            return None
        if self._setup.tokens is not None and not self._setup.tokens.known:
            await self._setup.tokens.read()
        observed = self.observe(key)
        plan = plan_tuning(observed, time.time(), self._setup.limits)
        await self._session(observed, plan)
        first: Exception | None = None
        for item in plan.jobs:
            try:
                await self._job(observed.trainer, item)
            except (ClusterError, RuntimeCallError, FilesError) as error:  # one job holds up no other
                first = first or error
        self._forget_gone()
        await self._record_tokens()
        if first is not None:
            raise first
        return plan.requeue_at

    async def _report_unreadable(self, key: Key) -> None:
        item = self.cache.unreadable.get(key)
        plan = plan_unreadable_job(item, time.time()) if item is not None else None
        if item is None or plan is None:
            return
        meta = item.raw["metadata"]
        try:
            await self._cluster.patch_raw_status(key, str(meta["resourceVersion"]), plan.status)
        except ObjectNotFoundError:
            return
        subject = Subject(key.kind.value, key.namespace, key.name, meta["uid"])
        await self._cluster.post_event(subject, plan.event, time.time())

    async def _session(self, observed: ObservedTuning, plan: TuningPlan) -> None:
        if plan.stop_uid is not None and observed.session is not None:
            meta = observed.session.meta
            await self._cluster.delete("Job", meta.namespace, meta.name, uid=plan.stop_uid)
            log.info("trainer ended", extra={"base": str(observed.key)})
        for manifest in plan.start:
            if manifest["kind"] != "Job":
                await self._cluster.apply_child(manifest)
                continue
            self.intake.session(await self._cluster.create(manifest))
            log.info("trainer started", extra={"base": str(observed.key)})

    async def _job(self, trainer: TrainerView | None, plan: JobPlan) -> None:
        """Applies the plan of one job. The status comes before what a trainer is to forget."""
        job = plan.observed.job
        memory = self._of(job)
        if plan.finalizers is not None:
            if job.meta.deleting:
                await self._record_tokens(at_once=True)  # before the object is gone
            await self._set_finalizers(job, plan.finalizers)
            return
        if plan.check_data and memory.checking is None and self._setup.files is not None:
            memory.checking = asyncio.create_task(self._check(self._setup.files, job), name=f"check {job.key}")
        if plan.promote is not None:
            await self._promote(job.base_key, memory, plan.promote)
        if plan.put is not None and trainer is not None and self._setup.files is not None:
            await self._put(self._setup.files, trainer, plan, memory)
        if plan.status is not None:
            await self._write(plan, memory)
        if plan.unregister and trainer is not None:
            if job.meta.deleting:
                await self._record_tokens(at_once=True)  # while its last report is known
            await self.trainers.delete(trainer.pod.meta.uid, job.meta.uid)  # its next report requests the next plan
        if plan.delete_data and self._setup.files is not None:
            await self._delete_files(self._setup.files, job)
            memory.deleted_data = True
            self.queue.add(job.base_key)
        if plan.delete_object:
            await self._cluster.delete(job.key.kind, job.meta.namespace, job.meta.name, uid=job.meta.uid)

    async def _set_finalizers(self, job: TuningObject, finalizers: tuple[str, ...]) -> None:
        try:
            raw = await self._cluster.set_finalizers(job.key, job.meta.resource_version, finalizers)
        except ObjectNotFoundError:
            return
        gone = job.meta.deleting and not finalizers
        self.intake.job(raw, deleted=gone)

    async def _promote(self, base: Key, memory: _Memory, manifest: Manifest) -> None:
        """Creates the LoraAdapter, or remembers why it is refused, for the next plan."""
        try:
            await self._cluster.create(manifest)
            memory.publish_problem = ""
        except ObjectConflictError:
            memory.publish_problem = ""  # it exists; the watch delivers it
        except ClusterError as error:
            memory.publish_problem = f"The LoraAdapter cannot be created: {error.detail or error}"
            memory.publish_failed_unix_s = time.time()
            self.queue.add(base)

    async def _put(self, files: JobFiles, trainer: TrainerView, plan: JobPlan, memory: _Memory) -> None:
        job, sent = plan.observed.job, plan.put
        if sent is None:
            return
        access = files.access(job, sent.init_from.source.uri if sent.init_from is not None else None)
        answer = await self.trainers.put(trainer.pod.meta.uid, job.meta.uid, sent.model_copy(update={"store": access}))
        memory.sent = Sent(answer.boot_id, sent, time.time())

    async def _write(self, plan: JobPlan, memory: _Memory) -> None:
        job = plan.observed.job
        if plan.status is None:
            return
        patch = merge_patch(job.status.dump(), plan.status.dump())
        try:
            raw = await self._cluster.patch_raw_status(job.key, job.meta.resource_version, patch)
        except ObjectNotFoundError:
            return
        memory.written_unix_s = time.time()
        self.intake.job(raw)
        subject = Subject(job.key.kind.value, job.meta.namespace, job.meta.name, job.meta.uid)
        for event in plan.events:
            await self._cluster.post_event(subject, event, time.time())

    async def _delete_files(self, files: JobFiles, job: TuningObject) -> None:
        await files.delete(job.meta, keep_result=is_served(job.meta, self._objects.adapters))

    async def _check(self, files: JobFiles, job: TuningObject) -> None:
        memory = self._of(job)
        try:
            async with self._permits:
                memory.finding = replace(await files.check(job), at_unix_s=time.time())
        finally:
            memory.checking = None
            self.queue.add(job.base_key)

    def _forget_gone(self) -> None:
        known = {job.meta.uid for job in self.cache.jobs}
        self._memory = {uid: memory for uid, memory in self._memory.items() if uid in known}


def is_served(job: Meta, adapters: Iterable[AdapterObject]) -> bool:
    """True if a LoraAdapter has the job's result."""
    result = f"store://{job.namespace}/adapters/{job.uid}"
    return any(adapter.spec.source.uri == result for adapter in adapters)
