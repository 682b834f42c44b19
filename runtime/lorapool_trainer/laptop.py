"""`python -m lorapool_trainer --model DIR --job job.yaml [--job more.yaml] --out DIR`: trains the jobs of YAML files.

All jobs train together on one copy of the base. Each writes a folder below --out: `adapter/` as peft saves it,
`step_metrics.csv`, `loss.svg`, `report.json` and checkpoints. After Ctrl-C, or after the process was killed, the same
command continues from the last checkpoint, with the result that an uninterrupted run would have had.

Exit status: 0 all jobs succeeded; 1 a job failed; 2 a file or an argument is wrong; 130 interrupted, to be continued.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapool_api.tuning.states import JobState
from lorapool_api.tuning.trainer_protocol import JobReport
from lorapool_trainer.console import Console, line
from lorapool_trainer.data.encoder import Encoder
from lorapool_trainer.engine import Engine, Numerics, UnsupportedBaseError
from lorapool_trainer.jobs.live import LiveJob
from lorapool_trainer.jobs.order import JobOrder
from lorapool_trainer.local_files import JobFileError, LocalFiles, base_identity, read_jobs
from lorapool_trainer.report import adapter_uri, report_of
from lorapool_trainer.session import BaseName, Session, SessionLimits
from lorapool_trainer.suspects import Suspects

SUCCEEDED, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
DATA_WAIT_S = 0.2
REPORT_FILE = "report.json"

Jobs = list[tuple[JobOrder, LocalFiles]]


@dataclass(frozen=True, slots=True)
class Options:
    model: Path
    jobs: tuple[Path, ...]
    out: Path
    device: str
    dtype: str
    numerics: Numerics | None
    tokens: int


def read_options(argv: Sequence[str]) -> Options:
    """Ends the process with code 2 if the command line is wrong."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m lorapool_trainer",
        description=first.partition(": ")[2],
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of the base model")
    add("--job", type=Path, required=True, action="append", metavar="FILE", help="YAML of FineTuneJobs; repeatable")
    add("--out", type=Path, required=True, metavar="DIR", help="where each job's folder is written")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--dtype", default="auto", help="type of the base's weights: auto, float32 or bfloat16 (%(default)s)")
    add("--numerics", choices=[item.value for item in Numerics], help="default: Exact on a CPU, Fast on a GPU")
    add("--tokens", type=int, default=1024, help="tokens that are computed together (%(default)s)")
    given = parser.parse_args(argv)
    numerics = Numerics(given.numerics) if given.numerics else None
    return Options(given.model, tuple(given.job), given.out, given.device, given.dtype, numerics, given.tokens)


def main(argv: Sequence[str]) -> int:
    options = read_options(argv)
    try:
        jobs = [job for path in options.jobs for job in read_jobs(path, options.out)]
        _check_names(jobs)
        session = _session(options, jobs)
    except (JobFileError, UnsupportedBaseError, OSError, ValueError) as error:
        print(f"lorapool_trainer: {error}", file=sys.stderr)
        return WRONG
    return _run(session, jobs)


def _check_names(jobs: Jobs) -> None:
    names = [order.uid for order, _ in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise JobFileError(f"two jobs are named {twice[0]}; names decide the folders of their results.")


def _session(options: Options, jobs: Jobs) -> Session:
    if not (options.model / "config.json").is_file():
        raise JobFileError(f"{options.model} is no model folder: it has no config.json.")
    options.out.mkdir(parents=True, exist_ok=True)
    numerics = options.numerics or (Numerics.EXACT if options.device == "cpu" else Numerics.FAST)
    print(f"loading {options.model}", flush=True)
    engine = Engine.load(
        str(options.model), dtype=options.dtype, device=options.device, numerics=numerics, token_budget=options.tokens
    )
    encoder = Encoder.of_base(options.model, rows=engine.base.vocab_size)
    base = BaseName(options.model.name, base_identity(options.model))
    return Session(engine, encoder, base, Suspects(options.out), SessionLimits(max_jobs=len(jobs)))


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
