"""Writes docs/performance.md and its pictures from the newest results and bench/performance.template.md.

`python bench/page.py [--check]`. A test compares the committed page with the results, so no figure in it is typed by
hand. The template has the text that people write: the demo, the operator, why a target is missed. It has one marker
`<!-- name -->` per generated part; an unknown marker is refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.places import BENCH, RESULTS, ROOT, newest_results
from common.records import Record, number, record_of
from common.svg import BarRow, bar_chart
from common.targets import TARGETS, Target

DOCS = ROOT / "docs"
TEMPLATE = BENCH / "performance.template.md"
W1_LABELS = {
    "base": ("Lorapool, base alone", "ours"),
    "distinct16": ("Lorapool, 16 distinct adapters", "ours"),
    "mixed_ranks": ("Lorapool, 16 distinct of ranks 4 to 64", "ours"),
    "one": ("Lorapool, one adapter for all", "ours"),
    "four": ("Lorapool, 4 adapters × 4 requests", "ours"),
    "http_distinct16": ("Lorapool over HTTP, 16 distinct", "ours"),
    "vllm_base": ("vLLM CPU, base alone", "theirs"),
    "vllm_base_LoRA_on": ("vLLM CPU, base alone, LoRA on", "theirs"),
    "vllm_distinct16": ("vLLM CPU, 16 distinct", "theirs"),
    "transformers_base": ("transformers' continuous batching, base", "theirs"),
    "llamacpp_base": ("llama.cpp's server, base", "theirs"),
    "llamacpp_distinct16": ("llama.cpp's server, 16 distinct", "theirs"),
    "peft_mixed_batch": ("peft, one mixed batch, 16 distinct", "theirs"),
    "peft_one_by_one": ("peft, set_adapter one by one", "theirs"),
}
PROFILES = {
    "profile.json": "As it is",
    "profile-before.json": "As it was, by torch's operators and the model's own code, LoRA by plain products",
}
SHOWN = 4.0
"""The picture of the targets ends at this multiple of a target."""


@dataclass(frozen=True)
class Results:
    head: Mapping[str, Any]
    records: Mapping[str, Record]

    @classmethod
    def read(cls, path: Path) -> Results:
        body = json.loads(path.read_text())
        items = [{k: v for k, v in item.items() if k not in ("target", "result")} for item in body.pop("records")]
        return cls(body, {item["name"]: record_of(item) for item in items})


def machine(results: Results) -> str:
    facts, load = results.head["machine"], results.head["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in results.head["versions"].items())
    again = "".join(
        f" `{program}` was run again on {ran['date']} at commit `{ran['commit']}`, load average {ran['load_average']} "
        f"before, on {ran['machine']['cores']} cores of an {ran['machine']['cpu']} ({ran['machine']['simd']})."
        for program, ran in results.head.get("again", {}).items()
    )
    return (
        f"Measured {results.head['date']} by `make {'bench-quick' if results.head['kind'] == 'quick' else 'bench'}` in "
        f"{number(results.head['minutes'])} min, commit `{results.head['commit']}`, on {facts['cores']} cores of an "
        f"{facts['cpu']} ({facts['simd']}), {facts['memory_gib']} GiB, Python {facts['python']}; load average "
        f"{load['before']} before and {load['after']} after.{again} {versions}."
    )


def targets(results: Results) -> str:
    lines = ["| what | target | measured | spread | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        record = results.records.get(target.record)
        figure, result = target.figure(record), target.result(record)
        measured = "-" if figure is None else number(figure)
        said = f"**{result}**" if result == "not met" else result
        if result == "not run" and record is not None:
            said += f": {record.note}"
        lines.append(f"| {target.says} | {target.bound} | {measured} | {_spread(target, record)} | {said} |")
    return "\n".join(lines)


def w1(results: Results) -> str:
    lines = ["| | fp32, tok/s | bf16, tok/s |", "|---|---|---|"]
    for key, (label, _kind) in W1_LABELS.items():
        cells = [_median(results.records.get(f"w1.{dtype}.rate.{key}")) for dtype in ("fp32", "bf16")]
        if cells != ["-", "-"]:
            lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    notes = [record.note for name, record in results.records.items() if name == "w1.fp32.distinct16_over_base"]
    equality = f"\nGreedy token sequences, fp32, {notes[0]}.\n" if notes and notes[0] else ""
    return "\n".join(lines) + "\n" + equality


def profile(_results: Results) -> str:
    """Where each millisecond of a decode step goes, with the native kernels and with torch's operators."""
    parts = []
    for name, says in PROFILES.items():
        body = json.loads((RESULTS / name).read_text())
        facts, profiles = body["machine"], body["profiles"]
        parts.append(
            f"{says} ({body['date']}, commit `{body['commit']}`, {facts['cores']} cores of an {facts['cpu']}, "
            f"load average {body['load_average']}):"
        )
        parts.append(_profile_table(profiles))
    return "\n\n".join(parts)


def _profile_table(profiles: Sequence[Mapping[str, Any]]) -> str:
    def line(label: str, cells: Iterable[str]) -> str:
        return f"| {label} | {' | '.join(cells)} |"

    heads = [f"{one['dtype'].replace('float', ' fp').replace('b fp', 'bf').strip()}, {one['rows']}" for one in profiles]
    lines = [line("ms per step", heads), "|---" * (len(heads) + 1) + "|"]
    for part in dict.fromkeys(part for one in profiles for part in one["parts_ms"]):
        lines.append(line(part, (f"{one['parts_ms'].get(part, 0.0):.2f}" for one in profiles)))
    sums = [sum(one["parts_ms"].values()) for one in profiles]
    lines.append(line("**sum of the parts**", (f"{added:.1f}" for added in sums)))
    lines.append(line("**the untouched step**", (f"{one['whole_ms']:.1f}" for one in profiles)))
    lines.append(
        line("sum / untouched", (f"{added / one['whole_ms']:.2f}" for added, one in zip(sums, profiles, strict=True)))
    )
    lines.append(line("the linear layers alone: the floor", (f"{one['floor_ms']:.1f}" for one in profiles)))
    lines.append(line("floor / untouched", (f"{one['floor_ms'] / one['whole_ms']:.2f}" for one in profiles)))
    return "\n".join(lines)


def loops(results: Results) -> str:
    """W2 to W4, one row each: the open loops at a moderate load."""
    lines = [
        "| | first token p50 / p99, ms | within 1 s / 6 s | inter-token p50 / p99, ms | tok/s |",
        "|---|---|---|---|---|",
    ]
    for line in _loop_lines(results):
        first, inter = (
            " / ".join(_value(results, f"{line}.{what}_{share}_ms") for share in ("p50", "p99"))
            for what in ("first_token", "inter_token")
        )
        within = " / ".join(_value(results, f"{line}.first_within_{limit}") for limit in ("1s", "6s"))
        lines.append(f"| {_loop_label(line)} | {first} | {within} | {inter} | {_value(results, f'{line}.rate')} |")
    return "\n".join(lines) if len(lines) > 2 else "Not in this run."


def _loop_lines(results: Results) -> list[str]:
    found = [name.removesuffix(".rate") for name in results.records if name.endswith(".rate")]
    return [line for line in found if line.startswith(("w2.", "w3.", "w4."))]


def _loop_label(line: str) -> str:
    workload, _, point = line.partition(".")
    what, number_ = re.fullmatch(r"([a-z]+)([\d.]+)", point).groups()  # type: ignore[union-attr]  # w2 names them so
    says = {"n": "{} adapters, α = 1", "alpha": "100 adapters, α = {}", "cv": "100 adapters, bursts of cv {}"}
    return f"{workload.upper()}: {says[what].format(number_)}"


def _value(results: Results, name: str) -> str:
    record = results.records.get(name)
    return "-" if record is None or record.value is None else number(record.value)


def rest(results: Results) -> str:
    """Every record that has no other place: no rate of W1, no open loop, no target."""
    held, loop_lines = {target.record for target in TARGETS}, set(_loop_lines(results))
    lines = ["| record | value | runs | against |", "|---|---|---|---|"]
    for name, record in results.records.items():
        if name in held or ".rate." in name or name.rpartition(".")[0] in loop_lines or record.value is None:
            continue
        runs = f"{number(min(record.runs))} to {number(max(record.runs))}" if len(record.runs) > 1 else ""
        against = f"{number(record.ratio)} × {record.baseline}" if record.ratio is not None else record.note
        lines.append(f"| `{name}` | {number(record.value)} {record.unit} | {runs} | {against} |")
    return "\n".join(lines)


def w1_picture(results: Results) -> str:
    rows = []
    for key, (label, kind) in W1_LABELS.items():
        if (record := results.records.get(f"w1.fp32.rate.{key}")) is not None and record.runs:
            rows.append(BarRow(label, record.value, min(record.runs), max(record.runs), kind))
    return bar_chart("W1: 16 requests of 32 + 64 tokens, fp32, 2 cores", rows, "tok/s")


def targets_picture(results: Results) -> str:
    """Each figure divided by its bound (or the reverse), so that 1 is the target for all."""
    rows = []
    for target in TARGETS:
        record = results.records.get(target.record)
        figure = target.figure(record)
        share = None if figure is None else _share(target, figure)
        rows.append(BarRow(target.says, share, kind="ours" if target.result(record) == "met" else "missed"))
    return bar_chart("Targets: right of the line is met", rows, "× the target", mark=1.0, limit=SHOWN)


PARTS: Mapping[str, Callable[[Results], str]] = {
    "machine": machine,
    "targets": targets,
    "w1": w1,
    "profile": profile,
    "loops": loops,
    "rest": rest,
}
PICTURES: Mapping[str, Callable[[Results], str]] = {
    "performance-targets.svg": targets_picture,
    "performance-w1.svg": w1_picture,
}


def render(template: str, results: Results) -> str:
    def part(match: re.Match[str]) -> str:
        if match[1] not in PARTS:
            raise ValueError(f"the template asks for {match[1]!r}; there are {', '.join(PARTS)}")
        return PARTS[match[1]](results)

    return re.sub(r"^<!-- ([\w-]+) -->$", part, template, flags=re.M)


def pages(results: Results) -> dict[Path, str]:
    text = {DOCS / "performance.md": render(TEMPLATE.read_text(), results)}
    return text | {DOCS / name: draw(results) for name, draw in PICTURES.items()}


def _share(target: Target, figure: float) -> float:
    if target.at_least is not None:
        return figure / target.at_least
    bound = target.at_most or 0.0
    return SHOWN * 2 if figure <= 0 else bound / figure


def _spread(target: Target, record: Record | None) -> str:
    if record is None or record.value is None:
        return ""
    if target.of == "ratio" and record.ratio_low is not None and record.ratio_high is not None:
        return f"{number(record.ratio_low)} to {number(record.ratio_high)}"
    return f"{number(min(record.runs))} to {number(max(record.runs))}" if len(record.runs) > 1 else ""


def _median(record: Record | None) -> str:
    if record is None or record.value is None:
        return "-"
    return f"{number(record.value)} ({number(min(record.runs))} to {number(max(record.runs))})"


def main() -> int:
    wanted = pages(Results.read(newest_results()))
    behind = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in behind:
            print(f"{path.relative_to(ROOT)} is behind the results: run `make bench-page`")
        return 1 if behind else 0
    for path in behind:
        path.write_text(wanted[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
