"""`python -m simulator` (`make simulate`): a day of a fleet, in fewer hours, printed and drawn.

PYTHONPATH=bench python -m simulator --adapters 1000000 --pods 1000 --out docs
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from lorapool_api.basemodel import BaseModelSpec
from simulator.fleet import BaseSimulation, Plan, Result
from simulator.pod import PodSettings
from simulator.report import add_up, figures, plots, table
from simulator.traffic import Burst, Traffic

POPULARITY = 0.3
"""Exponent of the bases' own popularity: the largest has about three times the traffic of the smallest of twenty."""
ANSWER_S = 30.0
"""Mean duration of an answer."""
BURST_PER_S = 10.0
"""An adapter that suddenly becomes popular gets so many requests per second for five minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulator", description=__doc__)
    parser.add_argument("--adapters", type=int, default=1_000_000)
    parser.add_argument("--pods", type=int, default=1000, help="largest number of pods of the fleet")
    parser.add_argument("--bases", type=int, default=20)
    parser.add_argument("--rate", type=float, default=160.0, help="mean number of requests per second of the fleet")
    parser.add_argument("--hours", type=float, default=4.0, help="length of the day; a short one is harder to follow")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the adapters' popularity")
    parser.add_argument("--start", type=float, default=90.0, help="seconds that the start of a pod takes")
    parser.add_argument("--no-spreading", action="store_true", help="without spreading of hot adapters, to compare")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the pictures scale-*.svg")
    options = parser.parse_args()
    began_s = time.monotonic()
    plans = plans_of(options)
    with ProcessPoolExecutor(options.processes) as pool:
        results = list(pool.map(run, plans))
    print(table(figures(results, options.adapters, options.start)))
    print(f"simulated in {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    if options.out is not None:
        for name, picture in plots(add_up(results)).items():
            (options.out / f"scale-{name}.svg").write_text(picture)
    return 0


def run(plan: Plan) -> Result:
    return BaseSimulation(plan).run()


def plans_of(options: argparse.Namespace) -> list[Plan]:
    """Returns one plan per base: its share of the traffic, of the pods and of what goes wrong."""
    weights = np.arange(1, options.bases + 1, dtype=float) ** -POPULARITY
    weights /= weights.sum()
    seconds = options.hours * 3600
    plans = []
    for number, weight in enumerate(weights):
        rng = np.random.default_rng(1000 + number)
        adapters = max(1, options.adapters // options.bases)
        scaling = {"maxReplicas": min(100, max(1, round(options.pods * weight))), "targetInFlight": 8}
        plans.append(
            Plan(
                spec=BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}, "scaling": scaling}),
                traffic=Traffic(
                    adapters,
                    options.rate * float(weight),
                    zipf=options.zipf,
                    answer_s=ANSWER_S,
                    day_s=seconds,
                    bursts=tuple(_burst(adapters, seconds, rng) for _ in range(max(1, round(seconds / 3600)))),
                ),
                pod=PodSettings(),
                seconds=seconds,
                start_s=options.start,
                losses=((seconds / 2, 0.1), *((float(at), 0.001) for at in rng.random(3) * seconds)),
                seed=number,
                spreading=not options.no_spreading,
            )
        )
    return plans


def _burst(adapters: int, seconds: float, rng: np.random.Generator) -> Burst:
    return Burst(float(rng.random() * seconds), 300.0, int(adapters * (0.1 + 0.8 * rng.random())), BURST_PER_S)


if __name__ == "__main__":
    sys.exit(main())
