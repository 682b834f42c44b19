"""What a prompt token, a generated token, the context and the rank of an adapter cost: fitted to timed steps.

    python bench/cost_weights.py BASE_FOLDER [--steps 1500] [--threads N] [--records PATH]

The engine's core runs random mixes of requests: prompts of different lengths, different numbers of rows, the base and
adapters of several ranks. The time of every step is explained by least squares as a fixed part (reading the weights)
plus costs times counts, none below 0. The results are the settings `cost_prefill_ns` to `cost_rank_ns`, by which the
time of a step is divided among its requests. Part of the steps is kept back, to say how well the costs predict them.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common.records import measured, parsed, parser, report
from profile_step import write_adapters

from lorapool_runtime.cgroup import usable_cores
from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.engines.torch.scheduling.scheduler import StepPlan

RANKS = (4, 8, 16, 64)
NAMES = ("prefill", "decode", "context", "rank")
MAX_BATCH, MAX_PROMPT, MAX_NEW = 32, 200, 60
HELD_BACK = 5
"""Every so many steps, one is not fitted."""


def counts_of(plan: StepPlan, ranks: dict[int, int]) -> list[float]:
    """Prompt tokens, generated tokens, attended tokens, and tokens times the rank of their adapter."""
    prefill = sum(chunk.num_tokens for chunk in plan.prefills)
    attended = sum(c.num_tokens * c.start + c.num_tokens * (c.num_tokens + 1) // 2 for c in plan.chunks)
    by_rank = sum(chunk.num_tokens * ranks.get(chunk.sequence.slot, 0) for chunk in plan.chunks)
    return [prefill, len(plan.decodes), attended, by_rank]


def timed_steps(core: Core, ranks: dict[int, int], steps: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Counts [steps, 4] and nanoseconds [steps] of steps with ever other requests."""
    plans: list[StepPlan] = []
    schedule = core.scheduler.schedule

    def scheduled() -> StepPlan:
        plans.append(schedule())
        return plans[-1]

    core.scheduler.schedule = scheduled  # type: ignore[method-assign]
    slots, made, wanted, taken = [BASE_SLOT, *ranks], 0, 1, list[int]()
    while len(taken) < steps:
        if len(taken) % 40 == 0:
            wanted = rng.randrange(1, MAX_BATCH + 1)
        while len(core._sequences) < wanted:
            made += 1
            prompt = tuple(rng.randrange(10, 200) for _ in range(rng.choice((8, 20, 50, MAX_PROMPT))))
            slot = rng.choice(slots)
            sampling = SamplingParams(max_tokens=rng.randrange(2, MAX_NEW), temperature=0.0, ignore_eos=True)
            core.add(GenerationRequest(str(made), prompt, slot, "base" if slot == BASE_SLOT else f"s{slot}", sampling))
        began_ns = time.perf_counter_ns()
        core.step()
        taken.append(time.perf_counter_ns() - began_ns)
    return np.array([counts_of(plan, ranks) for plan in plans], dtype=float), np.array(taken, dtype=float)


def fit(counts: np.ndarray, ns: np.ndarray) -> np.ndarray:
    """Fixed nanoseconds and the four costs, none below 0, by least squares of the relative errors."""
    terms = np.column_stack([np.ones(len(counts)), counts]) / ns[:, None]
    used = list(range(terms.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(terms[:, used], np.ones(len(ns)), rcond=None)
        if (found >= 0).all():
            result = np.zeros(terms.shape[1])
            result[used] = found
            return result
        used.pop(int(np.argmin(found)))


def error(costs: np.ndarray, counts: np.ndarray, ns: np.ndarray) -> float:
    """Median relative error of the predicted times."""
    predicted = costs[0] + counts @ costs[1:]
    return float(np.median(np.abs(predicted - ns) / ns))


def without_outliers(counts: np.ndarray, ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without steps that another process interrupted: those far above what the others of their size take."""
    costs = fit(counts, ns)
    good = ns <= 1.5 * (costs[0] + counts @ costs[1:])
    return counts[good], ns[good]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("base", type=Path)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--device", default="auto")
    arguments = parsed(options)
    torch.set_num_threads(arguments.threads or usable_cores())
    config = EngineConfig(
        str(arguments.base), max_batch=MAX_BATCH, slots=len(RANKS), max_rank=max(RANKS), device=arguments.device,
        max_model_len=1024, prefix_cache=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        core = Core(config)
        for slot, path in enumerate(write_adapters(core, Path(folder), ranks=RANKS)):
            core.load(slot, core.reader.read(path, max_rank=max(RANKS)))
        ranks = dict(enumerate(RANKS))
        timed_steps(core, ranks, 30, random.Random(1))
        counts, ns = timed_steps(core, ranks, arguments.steps, random.Random(2))
    counts, ns = counts[-arguments.steps :], ns[-arguments.steps :]
    counts, ns = without_outliers(counts, ns)
    kept = np.arange(len(ns)) % HELD_BACK == 0
    costs = fit(counts[~kept], ns[~kept])
    records = [measured("cost.fixed_us", "us", [costs[0] / 1000])]
    records += [measured(f"cost.{name}_ns", "ns", [value]) for name, value in zip(NAMES, costs[1:], strict=True)]
    records += [measured("cost.median_error_of_other_steps", "", [error(costs, counts[kept], ns[kept])])]
    report(records, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
