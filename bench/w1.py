"""W1: a closed batch of 16 requests × (32 prompt + 64 new) tokens, ours and every rival's, in alternating rounds.

    python bench/w1.py [--dtype float32|bfloat16] [--quick] [--rounds 3] [--new 64] [--only OWN,RIVALS] [--records PATH]

Every contestant is loaded before the first round and takes its turn in each; each round has prompts of its own, so no
cache helps. Equality is a gate: in float32 every row that peft computed one by one (a quarter of the batch a round)
must be equal token by token, or the program fails and writes nothing. A rival that is not installed is named as such.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from contest import Contestant, ContestError
from kit import COUNTED_ROUNDS, Record, against, alternate, hand_over, measured, not_run, parsed, parser
from peers import gguf_folder, llamacpp_server, vllm_python
from places import BENCH, LOGS, ROOT, VOLUMES, base_folder, w1_adapters
from workloads import NEW_TOKENS, REQUESTS, Batch, adapter_name, w1

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
WARM_UP_TOKENS = 8
RIVALS = ("vllm", "peft", "transformers", "llamacpp", "http")
NOT_INSTALLED = "not installed: make bench-peers"


class NotEqual(Exception):
    """Two engines disagree where they must not."""


@dataclass(frozen=True)
class Turn:
    """One contestant's part of a round. `label` names its series of rates."""

    label: str
    contestant: Contestant
    case: str
    rows: int = REQUESTS
    """Fewer than all: another part of the batch in each round."""
    before: str | None = None
    """A command to the contestant before its turn, outside the clock."""
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
    """(label, round) -> what was asked and what came."""
    lost: set[str] = field(default_factory=set)
    """Labels of rivals that died on the way: their rows are not run, ours go on."""

    def take(self, turn: Turn, round_number: int, new: int, *, counted: bool) -> None:
        batch = turn.batch(round_number, new)
        if turn.before:
            turn.contestant.ask({"do": turn.before})
        outcome = turn.contestant.run(batch)
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
    """The same for what came over HTTP: its text against the text of the tokens in process."""
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


def turns_of(stack: ExitStack, dtype: str, rivals: Sequence[str], quick: bool) -> tuple[list[Turn], dict[str, str]]:
    """Starts every contestant, side by side, and waits until all are loaded. (turns, versions)"""
    base = base_folder()
    adapters = w1_adapters(base)
    started: list[Contestant] = []

    def start(name: str, program: str, *arguments: str, python: str = sys.executable) -> Contestant:
        command = [python, str(BENCH / program), *arguments]
        contestant = stack.enter_context(Contestant(f"{name}-{SHORT[dtype]}", command, LOGS))
        started.append(contestant)
        return contestant

    own = start("own", "own_engine.py", str(base), str(adapters), dtype)
    turns = [
        Turn("base, none loaded", own, "base", before="unload"),
        Turn("distinct16", own, "distinct16"),
        Turn("base", own, "base"),
        Turn("shuffled", own, "shuffled"),
    ]
    if not quick:
        turns += [Turn("one", own, "one"), Turn("four", own, "four")]
    python = vllm_python()
    if "vllm" in rivals and python:
        plain = start("vllm-plain", "rival_vllm.py", str(base), str(adapters), dtype, "plain", python=str(python))
        lora = start("vllm-lora", "rival_vllm.py", str(base), str(adapters), dtype, "lora", python=str(python))
        turns += [Turn("vllm base", plain, "base"), Turn("vllm distinct16", lora, "distinct16")]
        if not quick:
            turns.append(Turn("vllm base, LoRA on", lora, "base"))
    if "transformers" in rivals:
        batching = start("transformers", "rival_transformers.py", str(base), dtype)
        turns.append(Turn("transformers base", batching, "base"))
    if "peft" in rivals:
        one = start("peft-one", "rival_peft.py", str(base), str(adapters), dtype, "one")
        mixed = start("peft-mixed", "rival_peft.py", str(base), str(adapters), dtype, "mixed")
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
    if "llamacpp" in rivals and server and dtype == "float32":
        llama = start("llamacpp", "rival_llamacpp.py", str(server), str(gguf_folder()))
        turns.append(Turn("llamacpp distinct16", llama, "distinct16"))
        if not quick:
            turns.append(Turn("llamacpp base", llama, "base"))
    if "http" in rivals:
        http = start("own-http", "own_http.py", str(base), str(VOLUMES), dtype)
        turns.append(Turn("http distinct16", http, "distinct16"))
    turns.append(Turn("mixed_ranks", own, "mixed_ranks"))
    versions: dict[str, str] = {}
    began_s = time.monotonic()
    for contestant in started:
        try:
            contestant.wait_until_loaded()
        except ContestError as error:
            if contestant is own:
                raise
            print(f"  {error}", file=sys.stderr, flush=True)
            turns = [turn for turn in turns if turn.contestant is not contestant]
            continue
        print(f"  {contestant.name} is loaded after {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
        versions |= contestant.versions
    return turns, versions


def run_rounds(turns: Sequence[Turn], rounds: int, new: int, quick: bool) -> Series:
    """A warm-up (round 0; few tokens when quick) and the counted rounds 1, 2, …"""
    series = Series()
    for number in range(rounds + 1):
        for turn in turns:
            if turn.only_round not in (None, number) or turn.label in series.lost:
                continue
            short = quick and number == 0
            counted = number > 0 and turn.only_round is None
            try:
                series.take(turn, number, WARM_UP_TOKENS if short else new, counted=counted)
            except ContestError as error:
                if turn.contestant.name.startswith("own-fp") or turn.contestant.name.startswith("own-bf"):
                    raise
                print(f"    {turn.label} is out: {error}", file=sys.stderr, flush=True)
                series.lost |= {other.label for other in turns if other.contestant is turn.contestant}
    for label in series.lost:
        series.rates.pop(label, None)  # rounds that were not whole pair with nothing
        print(f"  round {number} of {rounds}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return series


def loads(turns: Sequence[Turn], rounds: int) -> list[Record]:
    """One adapter of rank 16 in float32 (19.5 MB, in the page cache) from its files to its slot, ours and vLLM's."""
    contestants = {turn.label: turn.contestant for turn in turns}
    name = "loading.disk_to_slot_over_vllm"
    if "vllm distinct16" not in contestants:
        return [not_run(name, "ms", NOT_INSTALLED)] if not vllm_python() else []

    def load(label: str) -> float:
        seconds: float = contestants[label].ask({"do": "load", "name": adapter_name(0)})["seconds"]
        return seconds * 1e3

    runs = alternate({"ours": lambda: load("base"), "vLLM": lambda: load("vllm distinct16")}, rounds)
    return [against(name, "ms", runs["ours"], "vLLM CPU's add_lora", runs["vLLM"], "19.5 MB of float32")]


def gate(series: Series, dtype: str, rounds: int) -> str:
    """Says what was compared with peft one by one; in float32 raises NotEqual when a row differs."""
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
        raise NotEqual("; ".join(wrong))
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
    for name, ours, theirs, rival in wanted:
        if ours in series.rates and theirs in series.rates:
            records.append(
                against(f"{prefix}.{name}", "tok/s", series.rates[ours], rival, series.rates[theirs], note=note)
            )
            note = ""  # once is enough
        elif theirs in series.lost:
            records.append(not_run(f"{prefix}.{name}", "tok/s", f"{rival} died in the run"))
        elif ("vllm" in theirs and not vllm_python()) or ("llamacpp" in theirs and not llamacpp_server()):
            records.append(not_run(f"{prefix}.{name}", "tok/s", NOT_INSTALLED))
    return records + [
        measured(f"{prefix}.rate.{label.replace(', ', '_').replace(' ', '_')}", "tok/s", rates)
        for label, rates in series.rates.items()
    ]


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--dtype", default="float32", choices=sorted(SHORT))
    asked.add_argument("--quick", action="store_true", help="the cases that have a bar; a short warm-up")
    asked.add_argument("--rounds", type=int, default=COUNTED_ROUNDS)
    asked.add_argument("--new", type=int, default=NEW_TOKENS)
    asked.add_argument("--only", default=",".join(RIVALS), help="rivals, separated by commas; empty: ours alone")
    given = parsed(asked)
    rivals = [name for name in given.only.split(",") if name]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*(str(ROOT / part) for part in ("crds", "operator", "runtime")), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with ExitStack() as stack:
        turns, versions = turns_of(stack, given.dtype, rivals, given.quick)
        series = run_rounds(turns, given.rounds, given.new, given.quick)
        turns = [turn for turn in turns if turn.label not in series.lost]
        loaded = loads(turns, given.rounds) if given.dtype == "float32" else []
    try:
        note = "equal to ours: " + gate(series, given.dtype, given.rounds)
    except NotEqual as error:
        print(f"NOT EQUAL in {given.dtype}: {error}", file=sys.stderr)
        return 1
    records = records_of(series, given.dtype, note) + loaded
    hand_over(records, given, versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
