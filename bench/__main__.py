"""`python bench quick|full`: runs the programs, holds their records against the bars, writes the result files.

Called by `make bench-quick` and `make bench`; `--again w2.py` runs only that program anew, and the page says so: the
other figures stay what the last run found. Each program is a process of its own; one that fails says why, its rows
become "not run", and the exit code is 1. Writes bench/results/<date>-<machine>.json and bench/results/latest.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bars import BARS
from kit import Record, machine, not_run, number, read_records, slug
from places import BENCH, RESULTS, ROOT, base_folder, commit

LATEST = "latest.json"


@dataclass(frozen=True)
class Step:
    program: str
    """BASE among its arguments stands for the base's folder."""
    arguments: tuple[str, ...] = ()
    timeout_s: float = 300.0


QUICK = (
    Step("w1.py", ("--quick",), 1500.0),
    Step("gateway_overhead.py", (), 240.0),
    Step("loading.py", ("BASE", "--seconds", "10"), 240.0),
    Step("start.py", (), 240.0),
    Step("w2.py", ("--quick",), 1200.0),
    Step("w1.py", ("--quick", "--dtype", "bfloat16", "--only", "vllm,peft", "--new", "32"), 900.0),
)
FULL = (
    Step("w1.py", (), 3600.0),
    Step("w1.py", ("--dtype", "bfloat16"), 3600.0),
    Step("w2.py", (), 3600.0),
    Step("loading.py", ("BASE",), 600.0),
    Step("start.py", ("--rounds", "5"), 600.0),
    Step("gateway_overhead.py", (), 600.0),
    Step("w6.py", (), 1500.0),
)


def run(step: Step, scratch: Path) -> tuple[list[Record], dict[str, str], str | None]:
    """(records, versions, why it failed)"""
    if not (BENCH / step.program).exists():
        return [], {}, None
    out = scratch / f"{step.program}-{time.monotonic_ns()}.json"
    arguments = [str(base_folder()) if argument == "BASE" else argument for argument in step.arguments]
    print(f"\n== {step.program} {' '.join(step.arguments)}", flush=True)
    command = [sys.executable, str(BENCH / step.program), *arguments, "--records", str(out)]
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "runtime")))
    with subprocess.Popen(command, env=environ, cwd=ROOT) as process:
        try:
            if process.wait(step.timeout_s):
                return [], {}, f"{step.program} failed with {process.returncode}"
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: it has processes of its own to end
            return [], {}, f"{step.program} took more than {step.timeout_s:.0f} s"
    return *read_records(out), None


def with_missing(records: Sequence[Record], failures: Sequence[str]) -> list[Record]:
    """All bars have a record: a missing one says that it was not run, and what failed."""
    there = {record.name for record in records}
    why = "; ".join(failures) or "not in this run"
    return [*records, *(not_run(bar.record, "", why) for bar in BARS if bar.record not in there)]


def judged(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as JSON, with bar and verdict where there is a bar."""
    bars = {bar.record: bar for bar in BARS}
    items = []
    for record in records:
        item = asdict(record)
        if (bar := bars.get(record.name)) is not None:
            item |= {"bar": bar.bound, "verdict": bar.verdict(record)}
        items.append(item)
    return items


def bar_table(records: Sequence[Record]) -> str:
    by_name = {record.name: record for record in records}
    lines = []
    for bar in BARS:
        record = by_name.get(bar.record)
        figure = bar.figure(record)
        value = "-" if figure is None else number(figure)
        note = record.note if record is not None and figure is None else ""
        lines.append(f"{bar.says:58} {bar.bound:8} {value:>8}  {bar.verdict(record)}  {note}".rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("quick", "full"))
    parser.add_argument("--again", action="append", metavar="PROGRAM", help="only this one, into the last results")
    given = parser.parse_args()
    began_s, load = time.monotonic(), os.getloadavg()[0]
    steps = QUICK if given.what == "quick" else FULL
    if unknown := set(given.again or ()) - {step.program for step in steps}:
        parser.error(f"bench {given.what} has no program {', '.join(sorted(unknown))}")
    records: list[Record] = []
    versions: dict[str, str] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for step in steps:
            if given.again and step.program not in given.again:
                continue
            more, used, failure = run(step, Path(scratch))
            records += more
            versions |= used
            failures += [failure] if failure else []
            if given.again:
                write_again(step.program, more)
                continue
            # After each step, so that a run that is interrupted leaves what it measured; the rest says "not run".
            write_result(given.what, with_missing(records, failures), versions, load, time.monotonic() - began_s)
    print(f"\n{bar_table(with_missing(records, failures))}\n")
    minutes = (time.monotonic() - began_s) / 60
    print(f"{minutes:.1f} minutes, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def write_result(
    kind: str, records: Sequence[Record], versions: Mapping[str, str], load_before: float, seconds: float
) -> None:
    facts, today = machine(), datetime.datetime.now(datetime.UTC)
    result = {
        "date": today.date().isoformat(),
        "kind": kind,
        "commit": commit(),
        "machine": facts,
        "load_average": {"before": round(load_before, 1), "after": round(os.getloadavg()[0], 1)},
        "minutes": round(seconds / 60, 1),
        "versions": dict(sorted(versions.items())),
        "records": judged(records),
    }
    write(result)


def write_again(program: str, records: Sequence[Record]) -> None:
    """Puts one program's new records into the last results, which say which they are and by which commit."""
    result = json.loads((RESULTS / LATEST).read_text())
    if result["machine"] != machine():
        raise SystemExit("the last results are another machine's: run the whole")
    fresh = {item["name"]: item for item in judged(records)}
    result["records"] = [fresh.pop(item["name"], item) for item in result["records"]] + list(fresh.values())
    result["again"] = {**result.get("again", {}), program: commit()}
    write(result)


def write(result: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name in (f"{result['date']}-{slug(result['machine'])}.json", LATEST):
        (RESULTS / name).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
