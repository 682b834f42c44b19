"""Trains jobs of files on this machine: a session on the base, lines on the terminal, and a report of each job."""

from __future__ import annotations

import signal
import sys
import time

from lorapool_api.tuning.states import JobState
from lorapool_api.tuning.trainer_protocol import JobReport
from lorapool_trainer.console import Console, line
from lorapool_trainer.data.encoder import Encoder
from lorapool_trainer.engine import Engine, Numerics, UnsupportedBaseError
from lorapool_trainer.jobs.live import LiveJob
from lorapool_trainer.laptop import FAILED, INTERRUPTED, SUCCEEDED, WRONG, Command
from lorapool_trainer.local_files import Jobs, base_identity
from lorapool_trainer.report import adapter_uri, report_of
from lorapool_trainer.session import BaseName, Session, SessionLimits
from lorapool_trainer.suspects import Suspects

DATA_WAIT_S = 0.2
REPORT_FILE = "report.json"


def train(command: Command) -> int:
    """Trains until all jobs have ended, or a signal arrives. Returns the process's exit code."""
    try:
        session = _session(command)
    except (UnsupportedBaseError, OSError, ValueError) as error:
        print(f"lorapool_trainer: {error}", file=sys.stderr)
        return WRONG
    return _run(session, command.jobs)


def _session(command: Command) -> Session:
    print(f"loading {command.model}", flush=True)
    engine = Engine.load(
        str(command.model),
        dtype=command.dtype,
        device=command.device,
        numerics=Numerics(command.numerics.value),
        token_budget=command.tokens,
    )
    encoder = Encoder.of_base(command.model, rows=engine.base.vocab_size)
    base = BaseName(command.model.name, base_identity(command.model))
    return Session(engine, encoder, base, Suspects(command.out), SessionLimits(max_jobs=len(command.jobs)))


def _run(session: Session, jobs: Jobs) -> int:
    stop = _StopSignal()
    console = Console()
    for order, files in jobs:
        session.put(order, files)
    written: set[str] = set()
    while session.has_work and not stop.received:
        if not session.work():
            session.wait_for_data(DATA_WAIT_S)
        reports = _reports(session)
        for text in console.lines(reports, time.monotonic(), time.time()):
            print(text, flush=True)
        _write_ended(session, reports, written)
    session.close()
    reports = _reports(session)
    if stop.received and session.has_work:
        print("interrupted; the same command continues from here", flush=True)
        return INTERRUPTED
    for report in reports:
        print(_ending(session.jobs[report.uid], report), flush=True)
    return SUCCEEDED if all(report.state is JobState.SUCCEEDED for report in reports) else FAILED


def _reports(session: Session) -> list[JobReport]:
    now_s, now_unix_s = time.monotonic(), time.time()
    active = sum(job.active for job in session.jobs.values())
    found = []
    for job in session.jobs.values():
        place = job.files.folder.resolve().as_uri()
        found.append(
            report_of(
                job,
                place=place,
                output=adapter_uri(place),
                deaths=session.deaths(job.uid),
                shared_with=max(0, active - 1) if job.active else 0,
                now_s=now_s,
                now_unix_s=now_unix_s,
            )
        )
    return found


def _write_ended(session: Session, reports: list[JobReport], written: set[str]) -> None:
    for report in reports:
        if report.state.ended and report.uid not in written:
            written.add(report.uid)
            folder = session.jobs[report.uid].files.folder
            folder.mkdir(parents=True, exist_ok=True)
            text = report.model_dump_json(by_alias=True, exclude_none=True, indent=2)
            (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def _ending(job: LiveJob, report: JobReport) -> str:
    text = line(report, 0.0)
    return f"{text}  → {job.files.folder / 'adapter'}" if report.state is JobState.SUCCEEDED else text


class _StopSignal:
    """Ctrl-C or SIGTERM: the cycle is completed, then checkpoints are written. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this cycle", file=sys.stderr, flush=True)
