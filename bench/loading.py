"""What it costs to load an adapter into its slot, and how loads affect running requests.

    python bench/loading.py BASE_FOLDER [--dtype float32|bfloat16] [--seconds 10] [--rounds 3] [--records PATH]

Measures host to slot and disk (page cache) to slot, against the adapter's bytes divided by the bandwidth of one
thread's copy in the same run; then the inter-token times of running requests with and without one load and one unload a
second, in alternating intervals of two seconds.
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
from common.places import make_adapter
from common.records import Record, against, parsed, parser, percentile, report

from lorapool_runtime.background import lower_thread_priority
from lorapool_runtime.engines.interface import GenerationRequest, SamplingParams, TokenOutput
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.engine import TorchEngine

RUNNING = 8
"""Requests that run continuously, each on its own adapter; one more slot is loaded and unloaded."""
INTERVAL_S = 2.0
"""Length of each interval: without loads, then with loads."""
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
    """The best of `TRIES` in each round, for loads and copies: other guests of the machine can only add time."""
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
    """`RUNNING` requests that start again as soon as they end; records when each token came and the time since the
    last.
    """

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._outputs: queue.SimpleQueue[tuple[float, TokenOutput]] = queue.SimpleQueue()
        self._number = 0

    def run(self, seconds: float) -> list[tuple[float, float]]:
        """(seconds, milliseconds since the same request's previous token) of each token; a request's first token is
        excluded.
        """
        stop_s, last_s, gaps, open_requests = time.perf_counter() + seconds, {}, [], 0
        for slot in range(RUNNING):
            self._submit(slot)
            open_requests += 1
        while open_requests:
            at_s, output = self._outputs.get(timeout=60)
            before_s = last_s.get(output.request_id)
            if before_s is not None:
                gaps.append((at_s, (at_s - before_s) * 1e3))
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


class Churn:
    """In every second interval of `INTERVAL_S`, one load from disk and one unload a second; a context manager."""

    def __init__(self, engine: TorchEngine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._began_s = time.perf_counter()
        self.loads = 0

    def __enter__(self) -> Churn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def loads_at(self, at_s: float) -> bool:
        return int((at_s - self._began_s) / INTERVAL_S) % 2 == 1

    def _run(self) -> None:
        lower_thread_priority()  # as the server's reading threads do
        while not self._stop.wait(0.05):
            if not self.loads_at(time.perf_counter()):
                continue
            self._engine.load(RUNNING, self._engine.read_adapter(str(self._folder), max_rank=RANK)).result(60)
            self._stop.wait(0.5)
            self._engine.unload(RUNNING).result(60)
            self.loads += 1
            self._stop.wait(0.35)


def stall(engine: TorchEngine, folder: Path, seconds: float, rounds: int) -> list[Record]:
    """Alternates intervals of `INTERVAL_S` with and without loads within one run of traffic. Other guests of the
    machine come and go in seconds, so that a round of one kind alone would measure them.
    """
    traffic = Traffic(engine)
    traffic.run(2)
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    loads = 0
    for _ in range(rounds):
        with Churn(engine, folder) as going:
            gaps = traffic.run(2 * seconds)
        loads += going.loads
        for with_loads, rounds_of in found.items():
            rounds_of.append([gap_ms for at_s, gap_ms in gaps if going.loads_at(at_s) is with_loads])
    note = f"{RUNNING} requests running; {loads} loads from disk and as many unloads, one each a second"

    def record(name: str, share: float) -> Record:
        runs = {kind: [percentile(gaps_ms, share) for gaps_ms in each] for kind, each in found.items()}
        return against(name, "ms", runs[True], "no loads", runs[False], note)

    return [record("loading.inter_token_p50_ms", 0.5), record("loading.inter_token_p99_ms", 0.99)]


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("base")
    asked.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked.add_argument("--seconds", type=float, default=10.0, help="of traffic of each kind in a round")
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
    report(records, arguments, {"torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
