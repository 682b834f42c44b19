"""Several LoRA jobs trained together on one base, against peft, which trains them in turn on the same resident base.

    python bench/training.py BASE_FOLDER [--jobs 4] [--tokens 64,256] [--steps 4] [--rounds 3] [--records PATH]

Each job has rank 8 on all linear layers; a step is one example of as many tokens as the micro-batch, half of which
count. Both sides compute logits of counted tokens only, clip, and step the same AdamW; peft sets its adapter once for
all steps of a job. Memory is measured in processes of their own. Packing is planned for the five example tasks, without
computing anything.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the trainer's process sets it

import torch
from common.records import Record, against, alternate, measured, parsed, parser, report
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapool_runtime.cgroup import usable_cores
from lorapool_trainer.engine import Engine, Example, JobSettings, Numerics, Take, plan_cycle
from lorapool_trainer.engine.base import frozen_base
from lorapool_trainer.engine.memory import BYTES_PER_PARAMETER, used_bytes
from lorapool_trainer.engine.plan import Offer, batch_of, micro_batches

RANK = 8
BUDGET = 1024
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "finetunes"
CPU = torch.device("cpu")


def examples_of(tokens: int, count: int, seed: int, vocabulary: int) -> list[Example]:
    drawn = random.Random(seed)
    counted = tuple(at >= tokens // 2 for at in range(tokens))
    return [Example(tuple(drawn.randrange(vocabulary) for _ in range(tokens)), counted) for _ in range(count)]


def settings_of(tokens: int, steps: int, seed: int) -> JobSettings:
    return JobSettings(
        rank=RANK, alpha=2 * RANK, epochs=1, batch_size=1, max_steps=steps, seed=seed, micro_batch_tokens=tokens
    )


def together(engine: Engine, jobs: int, tokens: int, steps: int) -> float:
    """Tokens per second of all jobs in one trainer."""
    uids = [str(number) for number in range(jobs)]
    for number, uid in enumerate(uids):
        engine.add(uid, settings_of(tokens, steps, number), examples_of(tokens, steps, number, 1000))
    began_s = time.perf_counter()
    while takes := plan_cycle([engine.offer(uid) for uid in uids], engine.token_budget):
        engine.run(takes)
    took_s = time.perf_counter() - began_s
    for uid in uids:
        engine.remove(uid)
    return jobs * steps * tokens / took_s


class PeftInTurn:
    """peft's adapters on a copy of the model that shares its weights."""

    def __init__(self, stock: Any, jobs: int) -> None:
        import peft

        self.version = peft.__version__
        shared = {id(tensor): tensor for tensor in (*stock.parameters(), *stock.buffers())}
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = peft.get_peft_model(copy.deepcopy(stock, shared), config, adapter_name="0")
        for number in range(1, jobs):
            self.model.add_adapter(str(number), config)
        self.model.train()

    def run(self, jobs: int, tokens: int, steps: int) -> float:
        """Tokens per second of the jobs one after the other."""
        work = [examples_of(tokens, steps, number, 1000) for number in range(jobs)]
        optimizers: list[torch.optim.Optimizer] = []
        for number in range(jobs):
            self.model.set_adapter(str(number))
            optimizers.append(torch.optim.AdamW(self._weights(), lr=1e-3, weight_decay=0.01))
        began_s = time.perf_counter()
        for number, examples in enumerate(work):
            self.model.set_adapter(str(number))
            weights = self._weights()
            for example in examples:
                self._step(example, weights, optimizers[number])
        return jobs * steps * tokens / (time.perf_counter() - began_s)

    def _weights(self) -> list[torch.nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _step(self, example: Example, weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        ids = torch.tensor(example.ids)
        at = torch.tensor([i - 1 for i in range(1, len(ids)) if example.counted[i]])
        logits = self.model(input_ids=ids[None], logits_to_keep=at, use_cache=False).logits[0].float()
        (cross_entropy(logits, ids[at + 1], reduction="sum") / len(at)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def stock_model(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)


def speed(base: str, jobs: int, sizes: Sequence[int], steps: int, rounds: int) -> tuple[list[Record], str]:
    stock = stock_model(base)
    in_turn = PeftInTurn(stock, jobs)
    engine = Engine(frozen_base(stock), Numerics.EXACT, BUDGET)
    padding = f"rows padded to at least {engine.padding.floor} and to multiples of {engine.padding.multiple}"
    records = []
    for tokens in sizes:
        runs = alternate(
            {
                "together": lambda size=tokens: together(engine, jobs, size, steps),
                "peft": lambda size=tokens: in_turn.run(jobs, size, steps),
            },
            rounds,
        )
        note = f"{jobs} jobs, {tokens} tokens a micro-batch; {padding}"
        records.append(
            against(f"training.together_{tokens}", "tok/s", runs["together"], "peft in turn", runs["peft"], note)
        )
    return records, in_turn.version


# --- memory, in a process of its own -------------------------------------------------------


def memory_of_trainer(base: str, jobs: int, tokens: int) -> dict[str, int]:
    before = used_bytes(CPU)
    engine = Engine.load(base, dtype="float32", token_budget=BUDGET)
    figures = engine.memory()
    peak = _peak_above(before, lambda: together(engine, jobs, tokens, 2))
    parameters = sum(RANK * (m.in_features + m.out_features) for m in engine.base.linears.values())
    states = jobs * parameters * BYTES_PER_PARAMETER
    return {"peak": peak, "base": figures.base, "states": states, "activations": figures.activations}


def memory_of_peft(base: str, jobs: int, tokens: int) -> dict[str, int]:
    """Of one job in a process of its own: what each of `jobs` processes would take."""
    before = used_bytes(CPU)
    in_turn = PeftInTurn(stock_model(base), 1)
    return {"peak": _peak_above(before, lambda: in_turn.run(1, tokens, 2))}


def _peak_above(before: int, run: Callable[[], object]) -> int:
    """The highest memory while `run` runs, above `before`."""
    Path("/proc/self/clear_refs").write_text("5")
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 - before


MEMORY = {"trainer": memory_of_trainer, "peft": memory_of_peft}


def memory(base: str, jobs: int, tokens: int, rounds: int) -> list[Record]:
    def child(side: str) -> dict[str, int]:
        command = [sys.executable, __file__, base, "--memory", side, "--jobs", str(jobs), "--tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    ours, theirs = [child("trainer") for _ in range(rounds)], [child("peft") for _ in range(rounds)]
    rest = [(run["peak"] - run["states"] - run["activations"]) / run["base"] for run in ours]
    mib = {key: f"{ours[0][key] / 2**20:.0f} MiB" for key in ("base", "states", "activations")}
    note = f"{jobs} jobs, {tokens} tokens; {', '.join(f'{key} {size}' for key, size in mib.items())}"
    peaks, apart = [run["peak"] / 2**20 for run in ours], [jobs * run["peak"] / 2**20 for run in theirs]
    return [
        measured("training.peak_over_base", "× base", rest, f"peak less states and activations; {note}"),
        against("training.peak_mib", "MiB", peaks, f"{jobs} peft processes", apart, "above the process without a base"),
    ]


# --- packing --------------------------------------------------------------------------------


def packing(base: str, padding_of: Callable[[int], int]) -> list[Record]:
    """The share of computed rows that are tokens of the five example tasks, over one epoch of all five."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    tasks = [_lengths(tokenizer, path) for path in sorted(EXAMPLES.glob("*/train.jsonl"))]
    cycles = list(_cycles(tasks))
    share = sum(cycles) / sum(padding_of(tokens) for tokens in cycles)
    note = f"{len(tasks)} tasks, {sum(map(len, tasks))} examples, {len(cycles)} cycles of at most {BUDGET} tokens"
    return [measured("training.useful_rows", "share", [share], note)]


def _lengths(tokenizer: Any, path: Path) -> list[int]:
    lines = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in lines]
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _cycles(tasks: Sequence[Sequence[int]]) -> Iterator[int]:
    """Tokens of each cycle."""
    settings = JobSettings(epochs=1, batch_size=8, micro_batch_tokens=512)
    queues = [list(_steps(settings, lengths)) for lengths in tasks]
    while any(queues):
        offers = [Offer(str(at), tuple(steps[0])) for at, steps in enumerate(queues) if steps]
        takes = plan_cycle(offers, BUDGET)
        yield sum(_taken(queues[int(take.uid)], take) for take in takes)
        queues = [[step for step in steps if step] for steps in queues]


def _steps(settings: JobSettings, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Tokens of the micro-batches of each step."""
    for step in range(-(-len(lengths) // settings.batch_size)):
        tokens = [lengths[index] for index in batch_of(settings, len(lengths), step)]
        groups = micro_batches(tokens, settings.micro_batch_tokens)
        yield [sum(tokens[at] for at in group) for group in groups]


def _taken(steps: list[list[int]], take: Take) -> int:
    taken, steps[0] = steps[0][: take.micro_batches], steps[0][take.micro_batches :]
    return sum(taken)


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("base")
    asked.add_argument("--jobs", type=int, default=4)
    asked.add_argument("--tokens", default="64,256")
    asked.add_argument("--steps", type=int, default=4, help="of each job in each round")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--only", choices=["speed", "memory", "packing"])
    asked.add_argument("--memory", choices=MEMORY, help="measure this side's memory in this process and print it")
    given = parsed(asked)
    torch.set_num_threads(usable_cores())
    warnings.simplefilter("ignore")
    sizes = [int(size) for size in given.tokens.split(",")]
    if given.memory:
        print(json.dumps(MEMORY[given.memory](given.base, given.jobs, sizes[0])))
        return 0
    records: list[Record] = []
    versions = {"torch": torch.__version__}
    if given.only in (None, "speed"):
        found, versions["peft"] = speed(given.base, given.jobs, sizes, given.steps, given.rounds)
        records += found
    if given.only in (None, "memory"):
        records += memory(given.base, given.jobs, max(sizes), given.rounds)
    if given.only in (None, "packing"):
        engine = Engine.load(given.base, dtype="float32", token_budget=BUDGET)
        records += packing(given.base, engine.padding.rows)
    report(records, given, versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
