"""`python bench quick|full`: runs the programs, compares their records with the targets, writes the result file.

`--again open_loop_load.py` runs only that program and replaces its records in the last results; the page names it. Each
program is a process of its own. When one fails, its reason is printed, its rows become "not run" and the exit code is
1. The results go to bench/results/<date>-<machine>.json.
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

from common.places import BENCH, RESULTS, ROOT, base_folder, commit, newest_results
from common.records import Record, machine, not_run, number, read_records, slug
from common.targets import TARGETS


@dataclass(frozen=True)
class Step:
    program: str
    """The argument BASE is replaced with the base's folder."""
    arguments: tuple[str, ...] = ()
    timeout_s: float = 300.0


QUICK = (
    Step("closed_batch.py", ("--quick",), 1500.0),
    Step("gateway_overhead.py", (), 240.0),
    Step("loading.py", ("BASE", "--seconds", "10"), 240.0),
    Step("startup.py", (), 240.0),
    Step("open_loop_load.py", ("--quick",), 1200.0),
    Step("fairness.py", ("BASE",), 600.0),
    Step("closed_batch.py", ("--quick", "--dtype", "bfloat16", "--only", "vllm,peft", "--new", "32"), 900.0),
)
FULL = (
    Step("closed_batch.py", (), 3600.0),
    Step("closed_batch.py", ("--dtype", "bfloat16"), 3600.0),
    Step("vllm_overhead.py", (), 1800.0),
    Step("open_loop_load.py", (), 3600.0),
    Step("loading.py", ("BASE",), 600.0),
    Step("startup.py", ("--rounds", "5"), 600.0),
    Step("gateway_overhead.py", (), 600.0),
    Step("fairness.py", ("BASE", "--rounds", "5"), 900.0),
    Step("scale_to_zero.py", (), 1500.0),
    Step("hostile_caller.py", (), 600.0),
    Step("training.py", ("BASE", "--rounds", "5"), 1800.0),
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
            process.terminate()  # not killed: it must end its own child processes
            return [], {}, f"{step.program} took more than {step.timeout_s:.0f} s"
    return *read_records(out), None


def with_missing(records: Sequence[Record], failures: Sequence[str]) -> list[Record]:
    """Adds a record for every target that has none: not run, and which program failed."""
    there = {record.name for record in records}
    why = "; ".join(failures) or "not in this run"
    return [*records, *(not_run(target.record, "", why) for target in TARGETS if target.record not in there)]


def with_results(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as JSON, with target and result for records that have a target."""
    targets = {target.record: target for target in TARGETS}
    items = []
    for record in records:
        item = asdict(record)
        if (target := targets.get(record.name)) is not None:
            item |= {"target": target.bound, "result": target.result(record)}
        items.append(item)
    return items


def target_table(records: Sequence[Record]) -> str:
    by_name = {record.name: record for record in records}
    lines = []
    for target in TARGETS:
        record = by_name.get(target.record)
        figure = target.figure(record)
        value = "-" if figure is None else number(figure)
        note = record.note if record is not None and figure is None else ""
        lines.append(f"{target.says:58} {target.bound:8} {value:>8}  {target.result(record)}  {note}".rstrip())
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
            if given.again and not failure:
                write_again(step.program, more, load)
            if given.again:
                continue
            # Written after each step, so that an interrupted run keeps what it measured; the rest is "not run".
            write_result(given.what, with_missing(records, failures), versions, load, time.monotonic() - began_s)
    print(f"\n{target_table(with_missing(records, failures))}\n")
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
        "records": with_results(records),
    }
    write(RESULTS / f"{result['date']}-{slug(facts)}.json", result)


def write_again(program: str, records: Sequence[Record], load_before: float) -> None:
    """Replaces one program's records in the last results and notes there when, where and at which commit it ran.

    The machine may be another one than that of the whole run: each figure is compared with a baseline of its own run.
    """
    path = newest_results()
    result = json.loads(path.read_text())
    fresh = {item["name"]: item for item in with_results(records)}
    result["records"] = [fresh.pop(item["name"], item) for item in result["records"]] + list(fresh.values())
    ran = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "load_average": round(load_before, 1),
    }
    result["again"] = {**result.get("again", {}), program: ran}
    write(path, result)


def write(path: Path, result: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
