"""`python -m lorapool_trainer --model DIR --job job.yaml [--job more.yaml] --out DIR`: trains the jobs of YAML files.

All jobs train together on one copy of the base. Each writes a folder below --out: `adapter/` as peft saves it,
`step_metrics.csv`, `loss.svg`, `report.json` and checkpoints. After Ctrl-C, or after the process was killed, the same
command continues from the last checkpoint, with the result that an uninterrupted run would have had.

Exit status: 0 all jobs succeeded; 1 a job failed; 2 a file or an argument is wrong; 130 interrupted, to be continued.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapool_api.tuning.finetunejob import Numerics
from lorapool_trainer.local_files import JobFileError, Jobs, read_jobs

SUCCEEDED, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True)
class Command:
    """What is to be trained, on what."""

    model: Path
    jobs: Jobs
    out: Path
    device: str
    dtype: str
    numerics: Numerics
    tokens: int


def read_command(argv: Sequence[str]) -> Command:
    """Reads the command line and the jobs without torch, whose import takes seconds.

    Ends the process with code 2 and a line on stderr if one of them is wrong.
    """
    given = _read_options(argv)
    try:
        jobs = [job for path in given.job for job in read_jobs(path, given.out)]
        _check_names(jobs)
        if not (given.model / "config.json").is_file():
            raise JobFileError(f"{given.model} is no model folder: it has no config.json.")
        given.out.mkdir(parents=True, exist_ok=True)
    except (JobFileError, OSError) as error:
        print(f"lorapool_trainer: {error}", file=sys.stderr)
        sys.exit(WRONG)
    default = Numerics.EXACT if given.device == "cpu" else Numerics.FAST
    numerics = Numerics(given.numerics) if given.numerics else default
    return Command(given.model, jobs, given.out, given.device, given.dtype, numerics, given.tokens)


def _read_options(argv: Sequence[str]) -> argparse.Namespace:
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
    return parser.parse_args(argv)


def _check_names(jobs: Jobs) -> None:
    names = [order.uid for order, _ in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise JobFileError(f"two jobs are named {twice[0]}; names decide the folders of their results.")
