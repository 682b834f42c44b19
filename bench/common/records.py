"""Records, alternating rounds, medians and spreads: the measuring tools of every program of bench/.

A program parses its arguments by `parser` and `parsed`, measures, makes `Record`s (`measured`, `against`, `not_run`)
and reports them (`report`): they are printed and, given `--records PATH`, written there as JSON. `python bench
quick|full` runs the programs and merges their records into one result file. Standard library only, because it also runs
in the baselines' virtual environments. A figure needs rounds, and all its runs are kept next to the median.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COUNTED_ROUNDS = 3
"""The fewest rounds that have a meaningful median."""


@dataclass(frozen=True, slots=True)
class Record:
    """One figure. `name` is dotted, `subject.what`, e.g. `w1.fp32.distinct16_over_base` or `gateway.added_p50_ms`."""

    name: str
    unit: str
    value: float | None
    """Median of `runs`; None: not measured, for the reason in `note`."""
    runs: tuple[float, ...] = ()
    baseline: str | None = None
    baseline_value: float | None = None
    baseline_runs: tuple[float, ...] = ()
    ratio: float | None = None
    """Median of ours divided by the baseline's of the same round; above 1 is more of the unit, good or bad."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    note: str = ""


def measured(name: str, unit: str, runs: Sequence[float], note: str = "") -> Record:
    """An absolute figure: the median of at least one run (three, where a run is short enough to be repeated)."""
    if not runs:
        raise ValueError(f"{name}: no runs")
    return Record(name, unit, statistics.median(runs), tuple(runs), note=note)


def against(
    name: str, unit: str, runs: Sequence[float], baseline: str, baseline_runs: Sequence[float], note: str = ""
) -> Record:
    """A ratio to a baseline measured in the same rounds: our run i is paired with the baseline's run i."""
    if len(runs) != len(baseline_runs) or not runs:
        raise ValueError(f"{name}: {len(runs)} runs cannot be paired with {len(baseline_runs)} of {baseline}")
    ratios = [ours / theirs for ours, theirs in zip(runs, baseline_runs, strict=True)]
    return Record(
        name,
        unit,
        statistics.median(runs),
        tuple(runs),
        baseline,
        statistics.median(baseline_runs),
        tuple(baseline_runs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        note,
    )


def not_run(name: str, unit: str, why: str) -> Record:
    """A row that could not be measured; it is printed and kept."""
    return Record(name, unit, None, note=why)


def alternate(
    engines: Mapping[str, Callable[[], float]],
    rounds: int = COUNTED_ROUNDS,
    warm_up: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Runs A B C, A B C, … and returns what each engine returned in each counted round.

    The first round (or `warm_up` of every engine, where that is cheaper) is not counted. Runs that are close in time
    see the same machine, so that a ratio within a round is reliable where an absolute figure is not.
    """
    for name, run in engines.items():
        if warm_up is not None:
            warm_up(name)
        else:
            run()
    results: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, run in engines.items():
            results[name].append(run())
    return results


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` (0..1) of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


def timed(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


# --- a program ---------------------------------------------------------------------------


def parser(says: str | None) -> argparse.ArgumentParser:
    """An argument parser with `--records`, which every program has; `says` is the program's docstring."""
    made = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--records", type=Path, help="write the records there as JSON")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the arguments. From here on SIGTERM also ends the program's own child processes."""
    given = made.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return given


def report(records: Sequence[Record], given: argparse.Namespace, versions: Mapping[str, str] | None = None) -> None:
    print(table(records), flush=True)
    if given.records:
        write_records(given.records, records, versions)


# --- files -------------------------------------------------------------------------------


def write_records(path: Path, records: Sequence[Record], versions: Mapping[str, str] | None = None) -> None:
    """Writes the JSON file that a program hands to the driver."""
    body = {"records": [asdict(record) for record in records], "versions": dict(versions or {})}
    path.write_text(json.dumps(body, indent=1) + "\n")


def read_records(path: Path) -> tuple[list[Record], dict[str, str]]:
    body = json.loads(path.read_text())
    return [record_of(item) for item in body["records"]], dict(body.get("versions", {}))


def record_of(item: Mapping[str, Any]) -> Record:
    """From JSON; refuses unknown fields."""
    fields = {**item, "runs": tuple(item["runs"]), "baseline_runs": tuple(item["baseline_runs"])}
    return Record(**fields)


# --- the machine -------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine's properties that a reader needs to compare, without anything that identifies it."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "simd": _simd(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
    }


def slug(facts: Mapping[str, Any]) -> str:
    """`amd-epyc-2-cores`: the machine's part of a result's file name."""
    cpu = re.sub(r"\(r\)|\(tm\)|@.*|\b(cpu|processor|\d+-core)\b", " ", str(facts["cpu"]).lower())
    return "-".join([*re.findall(r"[a-z0-9.]+", cpu), str(facts["cores"]), "cores"])


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name; if it has no number (virtual machines hide it), with the processor's family and model."""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", cpuinfo.read_text(), re.M))
    name: str = facts.get("model name", platform.machine()).strip()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= set(facts):
        return name
    return f"{name}, family {facts['cpu family']} model {facts['model']}"


def _simd(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    flags = set(cpuinfo.read_text().split())
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((name for flag, name in known.items() if flag in flags), "none")


# --- on the screen -----------------------------------------------------------------------


def table(records: Sequence[Record]) -> str:
    """One line per record: value, runs, baseline, ratio."""
    lines = [f"load average {os.getloadavg()[0]:.1f}"]
    for record in records:
        if record.value is None:
            lines.append(f"{record.name:44} not run: {record.note}")
            continue
        line = f"{record.name:44} {number(record.value):>9} {record.unit:8} {_range(record.runs):20}"
        if record.ratio is not None and record.baseline_value is not None:
            low, high = number(record.ratio_low or 0), number(record.ratio_high or 0)
            line += f" {number(record.ratio):>6} ({low}..{high}) of {record.baseline}: {number(record.baseline_value)}"
        lines.append(line + (f"  [{record.note}]" if record.note else ""))
    return "\n".join(lines)


def number(value: float) -> str:
    """Formats with three significant digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _range(runs: Sequence[float]) -> str:
    return f"({number(min(runs))}..{number(max(runs))})" if len(runs) > 1 else ""
