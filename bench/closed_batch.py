"""W1: a closed batch of 16 requests × (32 prompt + 64 new) tokens, on our engine and every baseline, in alternating
rounds.

    python bench/closed_batch.py [--dtype float32|bfloat16] [--quick] [--only OWN,BASELINES] [--records PATH]

Every engine is loaded before the first round and takes its turn in each round. Each round has its own prompts, so that
no cache helps. Equality is a gate: in float32 every row that peft computed one by one (a quarter of the batch per
round) must be equal token by token, or the program fails and writes nothing. A baseline that is not installed is named.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from common.places import LOGS, ROOT, VOLUMES, base_folder, w1_adapters
from common.records import COUNTED_ROUNDS, Record, against, alternate, measured, not_run, parsed, parser, report
from common.workloads import NEW_TOKENS, REQUESTS, Batch, adapter_name, w1
from engines.baselines import gguf_folder, llamacpp_server, vllm_python
from engines.process import EngineProcess, EngineProcessError

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
WARM_UP_TOKENS = 8
BASELINES = ("vllm", "peft", "transformers", "llamacpp", "http")
NOT_INSTALLED = "not installed: make bench-baselines"


class NotEqualError(Exception):
    """Two engines gave different tokens where they must be equal."""


@dataclass(frozen=True)
class Turn:
    """One engine's part of a round. `label` names its series of rates."""

    label: str
    engine: EngineProcess
    case: str
    rows: int = REQUESTS
    """If fewer than all: each round takes a different part of the batch."""
    before: str | None = None
    """A command sent to the engine before its turn, not timed."""
    only_round: int | None = None
    """Not timed: a reference for equality in this round alone."""

    def batch(self, round_number: int, new: int) -> Batch:
        whole = w1(self.case, new, seed=round_number)
        first = round_number * self.rows % REQUESTS
        return whole.only(range(first, first + self.rows)) if self.rows < REQUESTS else whole


@dataclass
class Series:
    rates: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[tuple[str, int], tuple[Batch, list[list[int]]]] = field(default_factory=dict)
    """(label, round) -> the batch and the generated tokens."""
    lost: set[str] = field(default_factory=set)
    """Labels of baselines that ended early: their rows are not run; the others continue."""

    def take(self, turn: Turn, round_number: int, new: int, *, counted: bool) -> None:
        batch = turn.batch(round_number, new)
        if turn.before:
            turn.engine.ask({"do": turn.before})
        outcome = turn.engine.run(batch)
        self.tokens[turn.label, round_number] = (batch, outcome.tokens)
        said = f"    {turn.label}: {outcome.tokens_per_s:.0f} tok/s"
        print(said if counted else said + " (not counted)", file=sys.stderr, flush=True)
        if counted:
            self.rates.setdefault(turn.label, []).append(outcome.tokens_per_s)

    def by_request(self, label: str, round_number: int) -> dict[tuple[tuple[int, ...], str | None], list[int]]:
        batch, tokens = self.tokens[label, round_number]
        return dict(zip(zip(batch.prompts, batch.adapters, strict=True), tokens, strict=True))


def equal_rows(series: Series, ours: Sequence[str], theirs: str, rounds: Sequence[int]) -> tuple[int, int]:
    """(equal, compared) over every request that both computed."""
    equal = compared = 0
    for number in rounds:
        if (theirs, number) not in series.tokens:
            continue
        mine = {key: tokens for label in ours for key, tokens in series.by_request(label, number).items()}
        for key, tokens in series.by_request(theirs, number).items():
            if key in mine:
                length = min(len(tokens), len(mine[key]))
                compared += 1
                equal += tokens[:length] == mine[key][:length]
    return equal, compared


def equal_texts(series: Series, rounds: Sequence[int]) -> tuple[int, int]:
    """Counts (equal, compared) answers over HTTP: their text against the decoded tokens of the engine in process."""
    from transformers import AutoTokenizer

    label, equal, compared = "http distinct16", 0, 0
    tokenizer = AutoTokenizer.from_pretrained(base_folder(), local_files_only=True)
    for number in rounds:
        if (label, number) in series.tokens:
            mine = series.by_request("distinct16", number)
            for key, text in series.by_request(label, number).items():
                compared += 1
                equal += bytes(text).decode() == tokenizer.decode(mine[key], skip_special_tokens=True)
    return equal, compared


def turns_of(stack: ExitStack, dtype: str, baselines: Sequence[str], quick: bool) -> tuple[list[Turn], dict[str, str]]:
    """Starts all engines concurrently and waits until they are loaded. Returns (turns, versions)."""
    base = base_folder()
    adapters = w1_adapters(base)
    started: list[EngineProcess] = []

    def start(name: str, program: str, *arguments: str, python: str = sys.executable) -> EngineProcess:
        command = [python, "-m", program, *arguments]
        engine = stack.enter_context(EngineProcess(f"{name}-{SHORT[dtype]}", command, LOGS))
        started.append(engine)
        return engine

    own = start("own", "engines.own_engine", str(base), str(adapters), dtype)
    turns = [
        Turn("base, none loaded", own, "base", before="unload"),
        Turn("distinct16", own, "distinct16"),
        Turn("base", own, "base"),
        Turn("shuffled", own, "shuffled"),
    ]
    if not quick:
        turns += [Turn("one", own, "one"), Turn("four", own, "four")]
    python = vllm_python()
    if "vllm" in baselines and python:
        plain = start(
            "vllm-plain", "engines.baseline_vllm", str(base), str(adapters), dtype, "plain", python=str(python)
        )
        lora = start("vllm-lora", "engines.baseline_vllm", str(base), str(adapters), dtype, "lora", python=str(python))
        turns += [Turn("vllm base", plain, "base"), Turn("vllm distinct16", lora, "distinct16")]
        if not quick:
            turns.append(Turn("vllm base, LoRA on", lora, "base"))
    if "transformers" in baselines:
        batching = start("transformers", "engines.baseline_transformers", str(base), dtype)
        turns.append(Turn("transformers base", batching, "base"))
    if "peft" in baselines:
        one = start("peft-one", "engines.baseline_peft", str(base), str(adapters), dtype, "one")
        mixed = start("peft-mixed", "engines.baseline_peft", str(base), str(adapters), dtype, "mixed")
        turns += [
            Turn("peft one by one", one, "distinct16", rows=2),
            Turn("peft mixed batch", mixed, "distinct16"),
        ]
        if dtype == "float32":
            turns += [
                Turn("peft, mixed ranks", one, "mixed_ranks", rows=2, only_round=1),
                Turn("peft, base", one, "base", rows=2, only_round=1),
            ]
    server = llamacpp_server()
    if "llamacpp" in baselines and server and dtype == "float32":
        llama = start("llamacpp", "engines.baseline_llamacpp", str(server), str(gguf_folder()))
        turns.append(Turn("llamacpp distinct16", llama, "distinct16"))
        if not quick:
            turns.append(Turn("llamacpp base", llama, "base"))
    if "http" in baselines:
        http = start("own-http", "engines.own_http", str(base), str(VOLUMES), dtype)
        turns.append(Turn("http distinct16", http, "distinct16"))
    turns.append(Turn("mixed_ranks", own, "mixed_ranks"))
    versions: dict[str, str] = {}
    began_s = time.monotonic()
    for engine in started:
        try:
            engine.wait_until_loaded()
        except EngineProcessError as error:
            if engine is own:
                raise
            print(f"  {error}", file=sys.stderr, flush=True)
            turns = [turn for turn in turns if turn.engine is not engine]
            continue
        print(f"  {engine.name} is loaded after {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
        versions |= engine.versions
    return turns, versions


def run_rounds(turns: Sequence[Turn], rounds: int, new: int, quick: bool) -> Series:
    """Runs a warm-up (round 0; few tokens when quick) and the counted rounds 1, 2, …"""
    series = Series()
    for number in range(rounds + 1):
        for turn in turns:
            if turn.only_round not in (None, number) or turn.label in series.lost:
                continue
            short = quick and number == 0
            counted = number > 0 and turn.only_round is None
            try:
                series.take(turn, number, WARM_UP_TOKENS if short else new, counted=counted)
            except EngineProcessError as error:
                if turn.engine.name.startswith("own-fp") or turn.engine.name.startswith("own-bf"):
                    raise
                print(f"    {turn.label} is out: {error}", file=sys.stderr, flush=True)
                series.lost |= {other.label for other in turns if other.engine is turn.engine}
    for label in series.lost:
        series.rates.pop(label, None)  # rounds that were not whole pair with nothing
        print(f"  round {number} of {rounds}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return series


def loads(turns: Sequence[Turn], rounds: int) -> list[Record]:
    """Loads an adapter of rank 16 in float32 (19.5 MB, in the page cache) into a slot: ours and vLLM's."""
    engines = {turn.label: turn.engine for turn in turns}
    name = "loading.disk_to_slot_over_vllm"
    if "vllm distinct16" not in engines:
        return [not_run(name, "ms", NOT_INSTALLED)] if not vllm_python() else []

    def load(label: str) -> float:
        seconds: float = engines[label].ask({"do": "load", "name": adapter_name(0)})["seconds"]
        return seconds * 1e3

    runs = alternate({"ours": lambda: load("base"), "vLLM": lambda: load("vllm distinct16")}, rounds)
    return [against(name, "ms", runs["ours"], "vLLM CPU's add_lora", runs["vLLM"], "19.5 MB of float32")]


def gate(series: Series, dtype: str, rounds: int) -> str:
    """Reports what was compared with peft one by one. Raises NotEqualError in float32 when a row differs."""
    ours = ("distinct16", "mixed_ranks", "base", "shuffled")
    said, wrong = [], []
    for theirs in ("peft one by one", "peft, mixed ranks", "peft, base", "peft mixed batch", "vllm distinct16",
                   "vllm base", "transformers base", "llamacpp distinct16"):  # fmt: skip
        equal, compared = equal_rows(series, ours, theirs, range(rounds + 1))
        if not compared:
            continue
        said.append(f"{theirs} {equal}/{compared}")
        reference = theirs in ("peft one by one", "peft, mixed ranks", "peft, base")
        if reference and dtype == "float32" and equal < compared:
            wrong.append(said[-1])
    for name, (equal, compared) in {
        "own shuffled": equal_rows(series, ("distinct16",), "shuffled", range(rounds + 1)),
        "own over HTTP (as text)": equal_texts(series, range(rounds + 1)),
    }.items():
        if compared:
            said.append(f"{name} {equal}/{compared}")
            if dtype == "float32" and equal < compared:
                wrong.append(said[-1])
    if wrong:
        raise NotEqualError("; ".join(wrong))
    return ", ".join(said)


def records_of(series: Series, dtype: str, note: str) -> list[Record]:
    prefix = f"w1.{SHORT[dtype]}"
    wanted = [
        ("distinct16_over_base", "distinct16", "base", "own base"),
        ("mixed_ranks_over_base", "mixed_ranks", "base", "own base"),
        ("shuffled_over_ordered", "shuffled", "distinct16", "ordered"),
        ("base_loaded_over_unloaded", "base", "base, none loaded", "none loaded"),
        ("one_over_base", "one", "base", "own base"),
        ("four_over_base", "four", "base", "own base"),
        ("base_over_vllm", "base", "vllm base", "vLLM CPU, LoRA off"),
        ("base_over_vllm_lora_on", "base", "vllm base, LoRA on", "vLLM CPU, LoRA on"),
        ("distinct16_over_vllm", "distinct16", "vllm distinct16", "vLLM CPU"),
        ("distinct16_over_peft_one_by_one", "distinct16", "peft one by one", "peft, set_adapter"),
        ("distinct16_over_peft_mixed", "distinct16", "peft mixed batch", "peft, mixed batch"),
        ("base_over_transformers", "base", "transformers base", "transformers' continuous batching"),
        ("distinct16_over_llamacpp", "http distinct16", "llamacpp distinct16", "llama.cpp's server"),
        ("base_over_llamacpp", "base", "llamacpp base", "llama.cpp's server"),
        ("http_over_in_process", "http distinct16", "distinct16", "in process"),
    ]
    records = []
    for name, ours, theirs, baseline in wanted:
        if ours in series.rates and theirs in series.rates:
            records.append(
                against(f"{prefix}.{name}", "tok/s", series.rates[ours], baseline, series.rates[theirs], note=note)
            )
            note = ""  # once is enough
        elif theirs in series.lost:
            records.append(not_run(f"{prefix}.{name}", "tok/s", f"{baseline} died in the run"))
        elif ("vllm" in theirs and not vllm_python()) or ("llamacpp" in theirs and not llamacpp_server()):
            records.append(not_run(f"{prefix}.{name}", "tok/s", NOT_INSTALLED))
    return records + [
        measured(f"{prefix}.rate.{label.replace(', ', '_').replace(' ', '_')}", "tok/s", rates)
        for label, rates in series.rates.items()
    ]


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--dtype", default="float32", choices=sorted(SHORT))
    asked.add_argument("--quick", action="store_true", help="the cases that have a target; a short warm-up")
    asked.add_argument("--rounds", type=int, default=COUNTED_ROUNDS)
    asked.add_argument("--new", type=int, default=NEW_TOKENS)
    asked.add_argument("--only", default=",".join(BASELINES), help="baselines, separated by commas; empty: ours alone")
    given = parsed(asked)
    baselines = [name for name in given.only.split(",") if name]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [
            *(str(ROOT / part) for part in ("bench", "crds", "operator", "runtime")),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
    )
    with ExitStack() as stack:
        turns, versions = turns_of(stack, given.dtype, baselines, given.quick)
        series = run_rounds(turns, given.rounds, given.new, given.quick)
        turns = [turn for turn in turns if turn.label not in series.lost]
        loaded = loads(turns, given.rounds) if given.dtype == "float32" else []
    try:
        note = "equal to ours: " + gate(series, given.dtype, given.rounds)
    except NotEqualError as error:
        print(f"NOT EQUAL in {given.dtype}: {error}", file=sys.stderr)
        return 1
    records = records_of(series, given.dtype, note) + loaded
    report(records, given, versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
