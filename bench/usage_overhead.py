"""What the accounts of usage add to a token, a request and a step, against the same code without them, in turns.

    python bench/usage_overhead.py [--rounds 9] [--requests 1000] [--records PATH]

Requests run through `serving.generation` on an engine that answers at once, so that nothing else is measured. In each
round, the same requests run without accounts, with records in memory alone, and with a journal on the disk. Two
lengths of answers tell what belongs to a token and what to a request. The time is this process's processor time,
which other processes on the machine change little.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.records import Record, measured, parsed, parser, report

from lorapool_api.protocol import Usage
from lorapool_runtime.accounts.accounting import Accounting, Device
from lorapool_runtime.accounts.journal import JournalBounds
from lorapool_runtime.accounts.live_request import Asked
from lorapool_runtime.accounts.usage import Outcome, UsageTracker
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import FinishReason, GenerationRequest, SamplingParams, TokenOutput
from lorapool_runtime.engines.step_shares import StepWeights, split
from lorapool_runtime.openai.stops import Stops
from lorapool_runtime.serving.generation import Generation, Mailbox

SHORT, LONG = 1, 101
ROWS = 64
WEIGHTS = StepWeights.of_ns(prefill=1e6, decode=2e6, context=100.0, rank=1000.0)


class AnsweringEngine:
    """Delivers a whole answer at once."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def submit(self, request: GenerationRequest, sink: Any) -> None:
        for made in range(1, self.tokens + 1):
            finish = FinishReason.LENGTH if made == self.tokens else None
            sink(TokenOutput(request.request_id, 65, True, 8, made, 2, finish))

    def cancel(self, request_id: str) -> None:
        raise AssertionError(request_id)


class NoAccounts:
    """In the place of the accounts: counts nothing."""

    gpu_ns = 0

    def count(self, number: int, prompt: int, cached: int, completion: int) -> None:
        """Is called for each token, as the true one."""


def accounts(folder: Path | None) -> Accounting:
    bounds = JournalBounds(10_000, 2**30, folds=False)
    made = Accounting(folder, "bench", UsageTracker(10), Clock(), rows=512, bounds=bounds)
    made.open(Device("cpu", 8, 1, 1))
    return made


async def seconds_of(accounting: Accounting | None, requests: int, tokens: int) -> float:
    """Processor seconds of so many requests one after the other."""
    engine: Any = AnsweringEngine(tokens)
    mailbox = Mailbox(asyncio.get_running_loop())
    account = UsageTracker(1).of("uid", "demo/adapter")
    sampling = SamplingParams(max_tokens=tokens)
    begin = time.process_time()
    for number in range(requests):
        request = GenerationRequest(f"{number}-0", (1,) * 8, 0, "salt", sampling)
        live: Any = NoAccounts()
        if accounting is not None:
            asked = Asked(f"attempt-{number}", "request", "key-uid", "team-a", "sha256:" + "0" * 64, "demo/adapter")
            live = accounting.begin(asked, account, [request.request_id], 1)

        def on_end(outcome: Outcome, usage: Usage, live: Any = live) -> None:
            account.count(outcome, usage, live.gpu_ns)
            if accounting is not None:
                accounting.end(live, outcome, usage)

        generation = Generation(
            engine,
            mailbox,
            [request],
            n=1,
            live=live,
            stops=Stops(frozenset(), (), included=False),
            decode=lambda ids: "A" * len(ids),
            on_token=lambda _count: None,
            on_end=on_end,
        )
        generation.start()
        await generation.ended.wait()
    return time.process_time() - begin


async def per_token_and_request(accounting: Accounting | None, requests: int) -> tuple[float, float]:
    """Nanoseconds of a token and of a request."""
    short = await seconds_of(accounting, requests, SHORT)
    long = await seconds_of(accounting, requests, LONG)
    token = (long - short) / requests / (LONG - SHORT)
    return token * 1e9, (short / requests - token) * 1e9


def step_ns(accounting: Accounting, rounds: int) -> tuple[float, float]:
    """Nanoseconds of dividing a step among 64 rows in the engine's thread, and of counting it on the event loop."""
    tracker = UsageTracker(10)
    ids = [f"step-{number}" for number in range(ROWS)]
    lives = [accounting.begin(Asked(one), tracker.of(f"uid-{one}", one), [one], 1) for one in ids]
    dividing, counting = [], []
    for _ in range(rounds * 50):
        begin = time.perf_counter_ns()
        weights = [WEIGHTS.of_decode(100 + number, 16) for number in range(ROWS)]
        shares = list(zip(ids, split(12_345_678, weights), strict=True))
        middle = time.perf_counter_ns()
        now = time.monotonic_ns()
        accounting.step(now - 12_345_678, now, shares)
        counting.append(time.perf_counter_ns() - middle)
        dividing.append(middle - begin)
    for live in lives:
        accounting.discard(live)
    return statistics.median(dividing), statistics.median(counting)


async def measure(rounds: int, requests: int) -> list[Record]:
    runs: dict[str, list[tuple[float, float]]] = {"none": [], "memory": [], "disk": []}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"none": None, "memory": accounts(None), "disk": accounts(Path(folder))}
        for number in range(rounds + 1):
            for name, accounting in kinds.items():
                found = await per_token_and_request(accounting, requests)
                if number:  # the first one warms up
                    runs[name].append(found)
        disk = kinds["disk"]
        assert disk is not None
        dividing, counting = step_ns(disk, rounds)
        for accounting in kinds.values():
            if accounting is not None:
                await accounting.close()
    records = []
    for at, what in enumerate(("token", "request")):
        base = [one[at] for one in runs["none"]]
        records.append(measured(f"usage.{what}_without_ns", "ns", base))
        for name in ("memory", "disk"):
            added = [one[at] - before for one, before in zip(runs[name], base, strict=True)]
            records.append(measured(f"usage.{what}_added_{name}_ns", "ns", added))
    records.append(measured("usage.step_of_64_rows_divided_ns", "ns", [dividing]))
    records.append(measured("usage.step_of_64_rows_counted_ns", "ns", [counting]))
    return records


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--requests", type=int, default=1000)
    given = parsed(options)
    records: Sequence[Record] = asyncio.run(measure(given.rounds, given.requests))
    report(records, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
