"""What the native row kernel is worth: W1 with it and with plain products, A B A B in one process, and the base alone.

    python bench/lora_ways.py BASE_FOLDER [--dtypes float32 bfloat16] [--rounds 3] [--new 32] [--records PATH]

The kernel stays in the project as long as `kernel_over_plain` is at least 1.07 for 16 distinct adapters.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from records import Record, against, alternate, parsed, parser, report

from lorapool_runtime.cgroup import usable_cores
from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.weights.layout import lay_out
from lorapool_runtime.weights.reader import PackedAdapter

REQUESTS, PROMPT = 16, 32
MIXED = (4, 8, 16, 32, 64, 4, 8, 16, 32, 64, 4, 8, 16, 32, 64, 16)
SHUFFLED = (11, 2, 14, 7, 0, 9, 4, 13, 6, 1, 15, 10, 3, 12, 5, 8)


@dataclass(frozen=True)
class Workload:
    name: str
    slots: tuple[int, ...]
    ranks: tuple[int, ...] = (16,) * REQUESTS
    in_order: bool = True


WORKLOADS = (
    Workload("distinct16", tuple(range(REQUESTS))),
    Workload("shuffled16", SHUFFLED, in_order=False),
    Workload("four_by_four", tuple(i // 4 for i in range(REQUESTS))),
    Workload("one_adapter", (3,) * REQUESTS),
    Workload("mixed_ranks", tuple(range(REQUESTS)), MIXED),
)


def fill(core: Core, ranks: tuple[int, ...]) -> None:
    """A random adapter on every target of the base in each slot."""
    groups = core.base.groups
    linears = sum(group.size for group in groups)
    generator = np.random.default_rng(0)
    for slot, rank in enumerate(ranks):
        layout = lay_out(tuple(groups), (rank,) * linears, core.base.dtype.itemsize)
        values = torch.from_numpy((generator.standard_normal(layout.elements) * 0.02).astype(np.float32))
        values = values.to(core.base.dtype)
        buffer = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        core.load(slot, PackedAdapter(rank=rank, target_modules=(), layout=layout, buffer=buffer))


def run(core: Core, prompts: list[list[int]], slots: tuple[int, ...], new: int, in_order: bool) -> float:
    """Tokens a second."""
    greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    lora, began_s, tokens = core.base.lora, time.perf_counter(), 0
    by_slot = lora.set
    if not in_order:  # the scheduler orders rows by slot: undo it, to see what order is worth
        lora.set = lambda pieces: by_slot(_unordered(pieces))  # type: ignore[method-assign]
    try:
        for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
            core.add(GenerationRequest(str(i), tuple(prompt), slot, str(slot), greedy))
        while core.scheduler.has_work:
            tokens += len(core.step())
    finally:
        lora.set = by_slot  # type: ignore[method-assign]
    return tokens / (time.perf_counter() - began_s)


def _unordered(pieces):  # type: ignore[no-untyped-def]
    """The same rows with their slots dealt out anew where all have one row: the weights read are the same."""
    if len(pieces) != REQUESTS or any(piece.count != 1 for piece in pieces):
        return pieces
    return [type(p)(SHUFFLED[p.slot] if p.slot >= 0 else p.slot, p.begin, p.end) for p in pieces]


def measure(base: str, dtype: str, workloads: Sequence[Workload], rounds: int, new: int) -> list[Record]:
    core = Core(EngineConfig(base, dtype=dtype, slots=REQUESTS, max_batch=REQUESTS, max_model_len=512, device="cpu"))
    kernel = core.base.lora.kernel
    if kernel is None:
        raise SystemExit("the native kernel is not there: make native")
    generator = torch.Generator().manual_seed(0)
    size = (REQUESTS, PROMPT)
    prompts = torch.randint(5, core.facts.vocab_size - 5, size, generator=generator).tolist()
    records, ranks = [], None
    for load in workloads:
        if load.ranks != ranks:
            fill(core, load.ranks)
            ranks = load.ranks

        def turn(way: str, load: Workload = load) -> float:
            core.base.lora.kernel = kernel if way == "kernel" else None
            slots = (BASE_SLOT,) * REQUESTS if way == "base" else load.slots
            return run(core, prompts, slots, new, load.in_order or way == "base")

        with torch.inference_mode():
            found = alternate({way: (lambda way=way: turn(way)) for way in ("base", "plain", "kernel")}, rounds)
        name = f"lora.{dtype}.{load.name}"
        records.append(against(f"{name}.kernel_over_plain", "tok/s", found["kernel"], "plain", found["plain"]))
        records.append(against(f"{name}.kernel_over_base", "tok/s", found["kernel"], "base", found["base"]))
    return records


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("base")
    asked.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--new", type=int, default=32, help="tokens to generate per request")
    asked.add_argument("--only", nargs="+", default=[load.name for load in WORKLOADS])
    arguments = parsed(asked)
    chosen = tuple(load for load in WORKLOADS if load.name in arguments.only)
    torch.set_num_threads(usable_cores())
    records: list[Record] = []
    for dtype in arguments.dtypes:
        records += measure(arguments.base, dtype, chosen, arguments.rounds, arguments.new)
        gc.collect()
    report(records, arguments, {"torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
