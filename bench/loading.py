"""What it costs to bring an adapter into its slot, and what others notice of it.

    python bench/loading.py BASE_FOLDER [--dtype float32|bfloat16] [--seconds 10] [--rounds 3] [--records PATH]

Host to slot and disk (page cache) to slot, against the adapter's bytes divided by the bandwidth of one thread's copy
in the same run; then the inter-token times of running requests with and without one load and one unload a second,
in turns.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the runtime's process sets it

import numpy as np
import torch
from kit import Record, against, hand_over, parsed, parser, percentile
from places import make_adapter

from lorapool_runtime.config import EngineConfig
from lorapool_runtime.engine import TorchEngine
from lorapool_runtime.interface import GenerationRequest, SamplingParams, TokenOutput

RUNNING = 8
"""Requests that run all the time, each on an adapter of its own; one more slot is loaded and unloaded."""
NEW = 64
TRIES = 5
RANK = 16


def copy_bytes_per_s(size: int) -> float:
    """One thread, memory that is mapped already."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    times = []
    for _ in range(TRIES):
        began_s = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began_s)
    return size / min(times)


def loading(engine: TorchEngine, folder: Path, rounds: int) -> list[Record]:
    """The best of `TRIES` in each round, for the loads as for the copy: others on the machine only ever add."""
    disk_ms, host_ms, floor_ms, size = [], [], [], 0
    for number in range(rounds + 1):
        whole_s, fill_s = [], []
        for _ in range(TRIES):
            began_s = time.perf_counter()
            adapter = engine.read_adapter(str(folder), max_rank=RANK)
            middle_s = time.perf_counter()
            engine.load(RUNNING, adapter).result(60)
            end_s = time.perf_counter()
            engine.unload(RUNNING).result(60)
            size = adapter.host_bytes
            whole_s.append(end_s - began_s)
            fill_s.append(end_s - middle_s)
        if number:  # the first one warms up
            disk_ms.append(min(whole_s) * 1e3)
            host_ms.append(min(fill_s) * 1e3)
            floor_ms.append(size / copy_bytes_per_s(size) * 1e3)
    note = f"{size / 1e6:.1f} MB; 1.0 is one thread copying these bytes"
    return [
        against("loading.host_to_slot_ms", "ms", host_ms, "copy", floor_ms, note),
        against("loading.disk_to_slot_ms", "ms", disk_ms, "copy", floor_ms, note),
    ]


class Traffic:
    """`RUNNING` requests that start again as soon as they end; the times between their tokens."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._outputs: queue.SimpleQueue[tuple[float, TokenOutput]] = queue.SimpleQueue()
        self._number = 0

    def run(self, seconds: float) -> list[float]:
        """Milliseconds between neighbouring tokens of a request, its first token excluded."""
        stop_s, last_s, gaps, open_requests = time.perf_counter() + seconds, {}, [], 0
        for slot in range(RUNNING):
            self._submit(slot)
            open_requests += 1
        while open_requests:
            at_s, output = self._outputs.get(timeout=60)
            before_s = last_s.get(output.request_id)
            if before_s is not None:
                gaps.append((at_s - before_s) * 1e3)
            last_s[output.request_id] = at_s
            if output.finish_reason is not None:
                open_requests -= 1
                if at_s < stop_s:
                    self._submit(int(output.request_id.split("-")[0]))
                    open_requests += 1
        return gaps

    def _submit(self, slot: int) -> None:
        self._number += 1
        params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
        prompt = tuple(5 + (self._number * 7 + i) % 1000 for i in range(8))
        request = GenerationRequest(f"{slot}-{self._number}", prompt, slot, f"slot-{slot}", params)
        self._engine.submit(request, lambda output: self._outputs.put((time.perf_counter(), output)))


def churn(engine: TorchEngine, folder: Path, stop: threading.Event) -> int:
    """One load from disk and one unload a second; how many."""
    done = 0
    while not stop.wait(0.5):
        adapter = engine.read_adapter(str(folder), max_rank=RANK)
        engine.load(RUNNING, adapter).result(60)
        if stop.wait(0.5):
            break
        engine.unload(RUNNING).result(60)
        done += 1
    if engine.observe().healthy:
        engine.unload(RUNNING).result(60)
    return done


def stall(engine: TorchEngine, folder: Path, seconds: float, rounds: int) -> list[Record]:
    from lorapool_runtime.slot_filling import yield_to_the_batch

    traffic = Traffic(engine)
    traffic.run(2)
    quiet: dict[float, list[float]] = {0.5: [], 0.99: []}
    loaded: dict[float, list[float]] = {0.5: [], 0.99: []}
    for _ in range(rounds):
        for found, with_loads in ((quiet, False), (loaded, True)):
            stop = threading.Event()

            def load(stop: threading.Event = stop) -> None:
                yield_to_the_batch()  # as the server's reading threads do
                churn(engine, folder, stop)

            thread = threading.Thread(target=load)
            if with_loads:
                thread.start()
            gaps = traffic.run(seconds)
            stop.set()
            if with_loads:
                thread.join()
            for share, values in found.items():
                values.append(percentile(gaps, share))
    note = f"{RUNNING} requests running; one load from disk and one unload a second"
    return [
        against("loading.inter_token_p50_ms", "ms", loaded[0.5], "no loads", quiet[0.5], note),
        against("loading.inter_token_p99_ms", "ms", loaded[0.99], "no loads", quiet[0.99], note),
    ]


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("base")
    asked.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked.add_argument("--seconds", type=float, default=10.0, help="of traffic per turn")
    asked.add_argument("--rounds", type=int, default=3)
    arguments = parsed(asked)
    config = EngineConfig(
        arguments.base, dtype=arguments.dtype, max_rank=RANK, slots=RUNNING + 1, max_batch=RUNNING, max_model_len=512
    )
    engine = TorchEngine(config)
    engine.start()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(RUNNING + 1)]
        for number, folder in enumerate(folders):
            make_adapter(Path(arguments.base), folder, number, RANK)
        for slot, folder in enumerate(folders[:RUNNING]):
            engine.load(slot, engine.read_adapter(str(folder), max_rank=RANK)).result(60)
        gc.collect()
        records = loading(engine, folders[RUNNING], max(arguments.rounds, 5))
        records += stall(engine, folders[RUNNING], arguments.seconds, arguments.rounds)
    engine.stop(10)
    hand_over(records, arguments, {"torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
