"""The thread that computes: it owns the session, takes commands between two cycles, and leaves reports for HTTP."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from lorapool_api.tuning.trainer_protocol import JobReport, TrainerJob
from lorapool_artifacts.errors import ArtifactError
from lorapool_trainer.engine import MemoryFigures
from lorapool_trainer.jobs.live import LiveJob
from lorapool_trainer.jobs.order import JobOrder
from lorapool_trainer.report import report_of
from lorapool_trainer.serve.events import PART_LINES, EventLog
from lorapool_trainer.serve.store_files import ObjectStore, StoreFiles
from lorapool_trainer.session import Session

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
T = TypeVar("T")
MakeClient = Callable[[TrainerJob], ObjectStore]


@dataclass(frozen=True, slots=True)
class Published:
    """What HTTP may read at any time."""

    jobs: tuple[JobReport, ...] = ()
    busy_s: float = 0.0
    idle_since_s: float | None = None
    """Monotonic."""
    idle_since_unix_s: float | None = None
    memory: MemoryFigures | None = None


@dataclass
class _Entry:
    job: TrainerJob
    files: StoreFiles
    events: EventLog
    stored: JobReport | None = None
    """The report of a job that ended in an earlier trainer, or in this one."""
    reported: bool = False
    """Whether the report of the end is in the store."""
    retry_s: float = field(default=0.0)


class Worker:
    """`call` may be used by any thread; all else happens in the worker's own."""

    def __init__(
        self, session: Session, folder: Path, make_client: MakeClient, changed: Callable[[bool], None]
    ) -> None:
        """`changed(at_once)` is called after every change, in the worker's thread."""
        self._session, self._folder, self._make_client, self._changed = session, folder, make_client, changed
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._entries: dict[str, _Entry] = {}
        self._stopping = threading.Event()
        self.ended: Future[None] = Future()
        self.published = Published((), 0.0, time.monotonic(), time.time(), session.memory)
        self._thread = threading.Thread(target=self._run, name="trainer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the cycle, with a checkpoint of each job; `ended` says when."""
        self._stopping.set()
        self._commands.put(lambda: None)

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` between two cycles."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._commands.put(run)
        return future

    # --- commands -------------------------------------------------------------------------

    def put(self, uid: str, job: TrainerJob) -> JobReport:
        """Registers a job or takes its new `run`, `priority` and token. Raises ArtifactError when the store refuses."""
        entry = self._entries.get(uid)
        if entry is None:
            entry = self._entries[uid] = self._entered(uid, job)
        entry.job, entry.files.client = job, self._make_client(job)
        if entry.stored is None:
            self._session.put(order_of(uid, job), entry.files)
        self._publish(at_once=True)
        return self._report(uid, entry)

    def _entered(self, uid: str, job: TrainerJob) -> _Entry:
        files = StoreFiles(self._folder / uid, job, self._make_client(job))
        raw = files.read_report()
        stored = JobReport.model_validate_json(raw) if raw is not None else None
        if stored is not None and (stored.uid != uid or not stored.state.ended):
            stored = None  # of a deleted job of the same name
        events = EventLog(uid, number=files.event_parts() * 10 * PART_LINES)
        return _Entry(job, files, events, stored, reported=stored is not None)

    def delete(self, uid: str) -> None:
        """Stops the job without a checkpoint; nothing of it is written afterwards."""
        self._session.delete(uid)
        if self._entries.pop(uid, None) is not None:
            shutil.rmtree(self._folder / uid, ignore_errors=True)
        self._publish(at_once=True)

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._take_commands(wait=not self._session.has_work)
                if self._session.has_work and not self._session.work():
                    self._session.wait_for_data(IDLE_WAIT_S)
                self._store_news()
                self._publish(at_once=False)
            self._session.close()
            self._store_news(ending=True)
            self._publish(at_once=True)
            self.ended.set_result(None)
        except BaseException as error:
            self.ended.set_exception(error)

    def _take_commands(self, *, wait: bool) -> None:
        try:
            self._commands.get(wait, IDLE_WAIT_S if wait else None)()
            while True:
                self._commands.get_nowait()()
        except Empty:
            return

    def _store_news(self, *, ending: bool = False) -> None:
        """Events when a part is due, and the report of a job that ended. What the store refuses is tried again."""
        now_s = time.monotonic()
        for uid, entry in self._entries.items():
            job = self._session.jobs.get(uid)
            if job is None or entry.reported or now_s < entry.retry_s:
                continue
            try:
                self._store_news_of(entry, job, now_s, ended=job.state.ended or ending)
            except ArtifactError as error:
                entry.retry_s = now_s + (error.retry_after_s or 10.0)
                log.warning("the store refused", extra={"job": job.order.display, "error": error.message})

    def _store_news_of(self, entry: _Entry, job: LiveJob, now_s: float, *, ended: bool) -> None:
        entry.events.observe(job, time.time())
        if (text := entry.events.part(now_s, ended=ended)) is not None:
            entry.files.add_events(entry.files.event_parts(), text)
            entry.events.stored(now_s)
        entry.files.flush()
        if job.state.ended and not (job.failure and job.failure.reason.transient):
            report = self._report(job.uid, entry)
            entry.files.write_report(report.model_dump_json(by_alias=True, exclude_none=True))
            entry.reported = True

    # --- reports --------------------------------------------------------------------------

    def _report(self, uid: str, entry: _Entry) -> JobReport:
        if entry.stored is not None:
            return entry.stored.model_copy(update={"run": entry.job.run, "priority": entry.job.priority})
        job = self._session.jobs[uid]
        active = sum(other.active for other in self._session.jobs.values())
        made = report_of(
            job,
            place=entry.job.workspace.rstrip("/"),
            output=entry.job.output.rstrip("/"),
            deaths=self._session.deaths(uid),
            shared_with=active - 1 if job.active else 0,
            now_s=time.monotonic(),
            now_unix_s=time.time(),
        )
        return made

    def _publish(self, *, at_once: bool) -> None:
        before = self.published
        jobs = tuple(self._report(uid, entry) for uid, entry in self._entries.items())
        if self._session.has_work:
            idle_s, idle_unix_s = None, None
        else:
            idle_s, idle_unix_s = before.idle_since_s or time.monotonic(), before.idle_since_unix_s or time.time()
        self.published = Published(jobs, self._session.busy_s, idle_s, idle_unix_s, self._session.memory)
        states = [(job.uid, job.state) for job in jobs] != [(job.uid, job.state) for job in before.jobs]
        if at_once or states or jobs != before.jobs:
            self._changed(at_once or states)


def order_of(uid: str, job: TrainerJob) -> JobOrder:
    return JobOrder(
        uid=uid,
        display=job.display,
        data=job.data,
        lora=job.lora,
        training=job.training,
        checkpoints=job.checkpoints,
        priority=job.priority,
        run=job.run,
        created_unix_s=job.created_unix_s,
        crashes=job.crashes,
    )
