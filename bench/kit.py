"""The measuring kit: records, alternating rounds, medians and spreads. Every program of bench/ uses it.

A program takes its arguments by `parser` and `parsed`, measures, makes `Record`s (`measured`, `against`, `not_run`) and
hands them over (`hand_over`): printed and, given `--records PATH`, written there as JSON; `python bench quick|full`
runs the programs and merges their records into one result file. Only the standard library, because it also runs
inside the peers' virtual environments. It refuses a figure without rounds, and never averages a spread away: all runs
are kept.
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
"""Fewer make no median."""


@dataclass(frozen=True, slots=True)
class Record:
    """One figure. `name` is dotted, `subject.what`, e.g. `w1.fp32.distinct16_over_base` or `gateway.added_p50_ms`."""

    name: str
    unit: str
    value: float | None
    """Median of `runs`; None: not measured, `note` says why."""
    runs: tuple[float, ...] = ()
    rival: str | None = None
    rival_value: float | None = None
    rival_runs: tuple[float, ...] = ()
    ratio: float | None = None
    """Ours over the rival's, paired by round, median: above 1 is more of the unit, whether that is good or bad."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    note: str = ""


def measured(name: str, unit: str, runs: Sequence[float], note: str = "") -> Record:
    """An absolute figure: the median of at least one run (three, where a run is short enough to be repeated)."""
    if not runs:
        raise ValueError(f"{name}: no runs")
    return Record(name, unit, statistics.median(runs), tuple(runs), note=note)


def against(
    name: str, unit: str, runs: Sequence[float], rival: str, rival_runs: Sequence[float], note: str = ""
) -> Record:
    """A ratio to a rival measured in the same rounds: run i of ours is paired with run i of the rival's."""
    if len(runs) != len(rival_runs) or not runs:
        raise ValueError(f"{name}: {len(runs)} runs cannot be paired with {len(rival_runs)} of {rival}")
    ratios = [ours / theirs for ours, theirs in zip(runs, rival_runs, strict=True)]
    return Record(
        name,
        unit,
        statistics.median(runs),
        tuple(runs),
        rival,
        statistics.median(rival_runs),
        tuple(rival_runs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        note,
    )


def not_run(name: str, unit: str, why: str) -> Record:
    """A row that could not be measured here: it is printed and kept, never dropped."""
    return Record(name, unit, None, note=why)


def alternate(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int = COUNTED_ROUNDS,
    warm_up: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """A B C, A B C, …: what each contestant returned in each counted round.

    The first round, or `warm_up` of every contestant where that is cheaper, is not counted. Neighbours in time meet
    the same machine, so a ratio within a round stands where an absolute figure does not.
    """
    for name, run in contestants.items():
        if warm_up is not None:
            warm_up(name)
        else:
            run()
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            results[name].append(run())
    return results


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` (0..1) of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


def timed(run: Callable[[], Any]) -> float:
    """Seconds on the clock."""
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


# --- a program ---------------------------------------------------------------------------


def parser(says: str | None) -> argparse.ArgumentParser:
    """With `--records`, which every program has; `says` is its docstring."""
    made = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--records", type=Path, help="write the records there as JSON")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """From here on SIGTERM, by which the driver ends what takes too long, ends the program's own processes too."""
    given = made.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return given


def hand_over(records: Sequence[Record], given: argparse.Namespace, versions: Mapping[str, str] | None = None) -> None:
    print(table(records), flush=True)
    if given.records:
        write_records(given.records, records, versions)


# --- files -------------------------------------------------------------------------------


def write_records(path: Path, records: Sequence[Record], versions: Mapping[str, str] | None = None) -> None:
    """What one program hands to the driver."""
    body = {"records": [asdict(record) for record in records], "versions": dict(versions or {})}
    path.write_text(json.dumps(body, indent=1) + "\n")


def read_records(path: Path) -> tuple[list[Record], dict[str, str]]:
    body = json.loads(path.read_text())
    return [record_of(item) for item in body["records"]], dict(body.get("versions", {}))


def record_of(item: Mapping[str, Any]) -> Record:
    """From JSON; refuses unknown fields."""
    fields = {**item, "runs": tuple(item["runs"]), "rival_runs": tuple(item["rival_runs"])}
    return Record(**fields)


# --- the machine -------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a reader needs to compare, and nothing that names the machine itself."""
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
    """A name without a number says little (virtual machines hide it): then with the processor's family and model."""
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
    """One line a record: value, runs, rival, ratio."""
    lines = [f"load average {os.getloadavg()[0]:.1f}"]
    for record in records:
        if record.value is None:
            lines.append(f"{record.name:44} not run: {record.note}")
            continue
        line = f"{record.name:44} {number(record.value):>9} {record.unit:8} {_range(record.runs):20}"
        if record.ratio is not None and record.rival_value is not None:
            low, high = number(record.ratio_low or 0), number(record.ratio_high or 0)
            line += f" {number(record.ratio):>6} ({low}..{high}) of {record.rival}: {number(record.rival_value)}"
        lines.append(line + (f"  [{record.note}]" if record.note else ""))
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits that matter."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _range(runs: Sequence[float]) -> str:
    return f"({number(min(runs))}..{number(max(runs))})" if len(runs) > 1 else ""
