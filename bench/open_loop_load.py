"""Open loops against a runtime over HTTP: W2, W5 (cold tiers), W7 (churn), and in full W3 (skew) and W4 (bursts).

    python bench/open_loop_load.py [--quick] [--only w3] [--seconds 60] [--records PATH]

Adapters are of rank 16 and bfloat16 on disk, for 32 slots. Only those in a trace are written, and each has answered
once before a trace begins: W2 to W4 find them in a slot, in host memory or on disk, W5 also at their source. Throughput
with 500 adapters against 5 is measured with more load than the machine can serve, in alternating rounds on the same
arrivals; latencies are measured at 0.7 of the capacity, which is determined first. A warm-up round comes before.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from common.open_loop import Load, run_load, stream
from common.places import ROOT, VOLUMES, base_folder, make_adapter
from common.records import COUNTED_ROUNDS, Record, against, alternate, measured, parsed, parser, percentile, report
from common.workloads import REQUESTS, Arbaseline, adapter_name, open_loop
from engines.standalone import Standalone

from lorapool_api.common import HEADER_ADAPTER
from lorapool_api.protocol import DeleteAnswer

CLAIM = "w2"
LINES = ("w2", "w3", "w4")
WORKLOADS = (*LINES, "w5", "w7")
CHURNED = 3
"""Adapters that W7 loads and unloads."""
SLOTS = MAX_BATCH = 2 * REQUESTS
"""A slot for every row of the largest batch; with fewer, requests of different adapters would wait for each other."""
POPULATIONS = (5, 20, 100, 500)
OVERLOAD = 1.3
COMFORT = 0.7
DEADLINE_S = 240.0
FETCH_EVERY_S = 0.05
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_rank": 16, "slots": SLOTS, "max_batch": MAX_BATCH,
                            "max_model_len": 512, "prefix_cache": False}  # fmt: skip
"""No prefix cache: runs that are compared share their prompts, so that the second would hit the first's."""
NOTE = f"rank 16, {SLOTS} slots, host cache 1 GiB, each adapter fetched before"


class Bench:
    def __init__(self, server: Standalone, base: Path) -> None:
        self._server = server
        self._base = base
        self._keys: dict[int, str] = {}

    def load(self, arrivals: Sequence[Arbaseline]) -> Load:
        """Writes, registers and fetches the adapters of the arrivals, then sends the requests. No error is expected, so
        that any error ends the program.
        """
        wanted = sorted({arrival.adapter for arrival in arrivals} - set(self._keys))
        names = [adapter_name(number) for number in wanted]
        for number, name in zip(wanted, names, strict=True):
            make_adapter(self._base, VOLUMES / CLAIM / name, number, 16, "bfloat16")
        registered = self._server.register(CLAIM, names, idleAfterS=3600)
        self._keys |= {number: registered[name] for number, name in zip(wanted, names, strict=True)}
        keys = [self._keys.get(number, "") for number in range(max(self._keys) + 1)]
        if wanted:
            self._answered([Arbaseline(at * FETCH_EVERY_S, number, (5,), 1) for at, number in enumerate(wanted)], keys)
        return self._answered(arrivals, keys)

    def _answered(self, arrivals: Sequence[Arbaseline], keys: Sequence[str]) -> Load:
        load = run_load(self._server.port, arrivals, keys, DEADLINE_S)
        failed = [answer.error for answer in load.answers if answer.error]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(load.answers)} requests failed: {failed[0]}")
        return load


def capacity_per_s(bench: Bench) -> float:
    """Requests per second with five adapters, all sent at once. The first run is a warm-up."""
    arrivals = open_loop(adapters=5, per_s=1000.0, duration_s=0.03, seed=1)
    bench.load(arrivals)
    return len(arrivals) / bench.load(arrivals).seconds


def throughput(bench: Bench, per_s: float, duration_s: float, rounds: int) -> list[Record]:
    print(f"  throughput: {per_s:.1f} requests a second for {duration_s:.0f} s", file=sys.stderr, flush=True)
    counted = dict.fromkeys(POPULATIONS, 0)

    def run(adapters: int) -> float:
        seed = counted[adapters] = counted[adapters] + 1
        load = bench.load(open_loop(adapters=adapters, per_s=per_s, duration_s=duration_s, seed=seed))
        print(f"    {adapters} adapters: {load.tokens_per_s:.0f} tok/s", file=sys.stderr, flush=True)
        return load.tokens_per_s

    runs = alternate({"500": lambda: run(500), "5": lambda: run(5)}, rounds)
    return [against("w2.n500_over_n5", "tok/s", runs["500"], "5 adapters", runs["5"], note=NOTE)]


def latencies(bench: Bench, name: str, arrivals: Sequence[Arbaseline]) -> list[Record]:
    load = bench.load(arrivals)
    waited = sum(answer.no_slot > 0 for answer in load.answers)
    note = f"{len(load.answers)} requests" + (f", {waited} waited for a slot" if waited else "")
    return [
        measured(f"{name}.first_token_p50_ms", "ms", [load.first_token_s(0.50) * 1e3], note),
        measured(f"{name}.first_token_p99_ms", "ms", [load.first_token_s(0.99) * 1e3]),
        measured(f"{name}.inter_token_p50_ms", "ms", [load.inter_token_s(0.50) * 1e3]),
        measured(f"{name}.inter_token_p99_ms", "ms", [load.inter_token_s(0.99) * 1e3]),
        measured(f"{name}.first_within_1s", "share", [load.first_within(1.0)]),
        measured(f"{name}.first_within_6s", "share", [load.first_within(6.0)]),
        measured(f"{name}.rate", "tok/s", [load.tokens_per_s]),
    ]


def loops(bench: Bench, capacity: float, duration_s: float, wanted: Sequence[str]) -> list[Record]:
    """W2 to W4: one run per line, at a moderate load."""
    common: dict[str, Any] = {"per_s": capacity * COMFORT, "duration_s": duration_s, "seed": 7}
    lines: dict[str, dict[str, Any]] = {f"w2.n{adapters}": {"adapters": adapters} for adapters in POPULATIONS}
    lines |= {f"w3.alpha{alpha}": {"adapters": 100, "alpha": alpha} for alpha in (0.1, 0.3, 0.6, 1.0)}
    lines |= {f"w4.cv{cv}": {"adapters": 100, "cv": float(cv)} for cv in (1, 2, 4, 8)}
    records = []
    for name, line in lines.items():
        if name.startswith(tuple(wanted)):
            print(f"  {name}", file=sys.stderr, flush=True)
            records += latencies(bench, name, open_loop(**line, **common))
    return records


# --- W7 ----------------------------------------------------------------------------------


class Churn:
    """One load from disk and one unload a second, of adapters that receive no requests; a context manager. Each is
    deleted half a second after its load; the bytes that the runtime reports as freed prove that it was loaded.
    """

    def __init__(self, server: Standalone, adapters: Mapping[str, str]) -> None:
        self._server, self._keys = server, list(adapters.values())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="churn")
        self._failure: str | None = None
        self.loads = 0

    def __enter__(self) -> Churn:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure and error is None:
            raise SystemExit(self._failure)

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            uid, digest = self._keys[self.loads % len(self._keys)].split("@")
            source = {"uri": f"pvc://{CLAIM}/{uid}"}
            try:
                self._server.ask(
                    "PUT", f"/v1/adapters/{uid}/{digest}", {"display": f"bench/{uid}", "source": source, "load": True}
                )
                time.sleep(0.5)
                answer = DeleteAnswer.model_validate(self._server.ask("DELETE", f"/v1/adapters/{uid}/{digest}"))
            except (OSError, RuntimeError, http.client.HTTPException) as failure:
                self._failure = f"the churn failed: {failure}"
                return
            if not answer.freed_device_bytes:
                self._failure = f"{uid} was not loaded half a second after it was asked for"
                return
            self.loads += 1


def churn(bench: Bench, server: Standalone, base: Path, per_s: float, duration_s: float, rounds: int) -> list[Record]:
    """W7: the same arrivals for five resident adapters without, with, with and without churn. The four runs of a round
    are affected about equally by other guests of the machine. A warm-up comes before.
    """
    print(f"  churn: {per_s:.1f} requests a second, 4 x {duration_s:.0f} s a round", file=sys.stderr, flush=True)
    names = [f"churn{number}" for number in range(CHURNED)]
    for number, name in enumerate(names):
        make_adapter(base, VOLUMES / CLAIM / name, 7000 + number, 16, "bfloat16")
    adapters = server.register(CLAIM, names)
    gaps_ms: dict[bool, list[list[float]]] = {False: [], True: []}
    loads = 0

    def run(arrivals: Sequence[Arbaseline], *, churned: bool) -> list[float]:
        nonlocal loads
        if not churned:
            return bench.load(arrivals).gaps_ms
        with Churn(server, adapters) as going:
            found = bench.load(arrivals).gaps_ms
        loads += going.loads
        return found

    def arrivals(seed: int) -> Sequence[Arbaseline]:
        return open_loop(adapters=5, per_s=per_s, duration_s=duration_s, seed=100 + seed)

    for churned in (False, True):
        run(arrivals(0), churned=churned)
    loads = 0
    for number in range(rounds):
        for of_kind in gaps_ms.values():
            of_kind.append([])
        for churned in (False, True, True, False):
            gaps_ms[churned][-1] += run(arrivals(1 + number), churned=churned)
    note = f"5 adapters, {loads} loads from disk and as many unloads"

    def record(name: str, share: float) -> Record:
        runs = {kind: [percentile(gaps, share) for gaps in each] for kind, each in gaps_ms.items()}
        return against(name, "ms", runs[True], "no churn", runs[False], note)

    return [record("w7.inter_token_p50_ms", 0.5), record("w7.inter_token_p99_ms", 0.99)]


# --- W5 ----------------------------------------------------------------------------------


def cold(base: Path, each: int = 5) -> list[Record]:
    """W5: time to the first token of an adapter that is in a slot, in host memory, on disk, or only at its source."""
    names = [f"cold{number}" for number in range(each)]
    for number, name in enumerate(names):
        make_adapter(base, VOLUMES / CLAIM / name, 5000 + number, 16, "bfloat16")
    settings = SETTINGS | {"sweep_interval_s": 0.1, "host_idle_s": 1.0}
    times_ms: dict[str, list[float]] = {"source": [], "device": [], "host": [], "disk": []}
    with tempfile.TemporaryDirectory() as cache, Standalone(base, VOLUMES, Path(cache), settings, "w5") as server:
        server.wait_until_ready()
        for name, key in server.register(CLAIM, names, idleAfterS=1.0).items():
            for tier in times_ms:
                if tier in ("host", "disk"):
                    _wait_for_tier(server, name, tier)
                times_ms[tier].append(_first_token_ms(server.port, key))
    return [measured(f"w5.{tier}_first_token_ms", "ms", runs) for tier, runs in times_ms.items()]


def _wait_for_tier(server: Standalone, uid: str, tier: str, timeout_s: float = 30.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        reports = server.ask("GET", "/v1/runtime")["adapters"]
        if next(report["tier"] for report in reports if report["uid"] == uid) == tier:
            return
        time.sleep(0.02)
    raise SystemExit(f"{uid} did not reach the tier {tier} in {timeout_s:.0f} s")


def _first_token_ms(port: int, key: str) -> float:
    async def ask() -> float:
        body = {"model": "base", "prompt": [5, 6, 7, 8], "max_tokens": 2, "temperature": 0, "stream": True}
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            answered = await stream(session, {**body, "ignore_eos": True}, {HEADER_ADAPTER: key})
        if answered.error:
            raise SystemExit(answered.error)
        return answered.first_s * 1e3

    return asyncio.run(ask())


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--quick", action="store_true", help="throughput, churn and cold tiers only, in short rounds")
    asked.add_argument("--only", choices=WORKLOADS, action="append", help="of them; may be repeated")
    asked.add_argument("--seconds", type=float, help="of each run, instead of the workload's own")
    given = parsed(asked)
    wanted = given.only or WORKLOADS
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "runtime"))
    base = base_folder()
    with tempfile.TemporaryDirectory() as cache, Standalone(base, VOLUMES, Path(cache), SETTINGS, "w2") as server:
        server.wait_until_ready()
        bench = Bench(server, base)
        capacity = capacity_per_s(bench)
        records = [measured("w2.capacity", "req/s", [capacity], "5 adapters, all at once")]
        if "w2" in wanted:
            duration_s = given.seconds or (5.0 if given.quick else 30.0)
            records += throughput(bench, capacity * OVERLOAD, duration_s, COUNTED_ROUNDS)
        lines = ["w2.n100"] if given.quick and not given.only else [one for one in LINES if one in wanted]
        records += loops(bench, capacity, given.seconds or (8.0 if given.quick else 60.0), lines) if lines else []
        if "w7" in wanted:
            duration_s = given.seconds or (20.0 if given.quick else 30.0)
            records += churn(bench, server, base, capacity * COMFORT, duration_s, COUNTED_ROUNDS)
    records += cold(base, 3 if given.quick else 5) if "w5" in wanted else []
    report(records, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
