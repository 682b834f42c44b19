"""Counts requests until it kills itself at a point: `python accounts_witness.py FOLDER FILE POINT COUNT`.

It stands for a runtime, without an engine: the witness writes each token of each attempt to FILE, and what a reader has
acknowledged to FILE.read. It imports no framework, so that a test can kill many of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapool_api.protocol import Usage
from lorapool_api.usage_protocol import UsagePage
from lorapool_runtime.accounts import accounting, journal, journal_file
from lorapool_runtime.accounts.accounting import Accounting, Device
from lorapool_runtime.accounts.journal import JournalBounds
from lorapool_runtime.accounts.live_request import Asked, LiveRequest
from lorapool_runtime.accounts.usage import Outcome, UsageTracker
from lorapool_runtime.clock import Clock

POINTS = (
    "a token",
    "before a write",
    "within a write",
    "after a write",
    "before the row is free",
    "after the row is free",
    "before a minute is written",
    "after a minute is written",
    "before a new file is written",
    "after a new file is written",
    "after a new file took its place",
    "after an acknowledgement",
)


class Point:
    def __init__(self, name: str, count: int) -> None:
        self._name, self._left = name, count

    def come_to(self, name: str, before: Callable[[], object] = lambda: None) -> None:
        if name == self._name:
            self._left -= 1
            if not self._left:
                before()
                os.kill(os.getpid(), signal.SIGKILL)


def around(point: Point, owner: Any, name: str, before: str, after: str) -> None:
    """Lets every call of a method come to a point before and to one after it."""
    real = getattr(owner, name)

    def patched(*arguments: Any) -> Any:
        point.come_to(before)
        result = real(*arguments)
        point.come_to(after)
        return result

    setattr(owner, name, patched)


def patch(point: Point) -> None:
    around(point, journal_file.JournalFile, "append", "before a write", "after a write")
    append = journal_file.JournalFile.append

    def half(self: Any, lines: bytes) -> None:
        point.come_to("within a write", lambda: os.write(self._fd, lines[: len(lines) // 2]))
        append(self, lines)

    journal_file.JournalFile.append = half  # type: ignore[method-assign]
    around(point, accounting.Accounting, "_forget", "before the row is free", "after the row is free")
    around(point, accounting.Accounting, "_on_minute", "before a minute is written", "after a minute is written")
    around(point, journal_file.Rewriting, "write", "before a new file is written", "after a new file is written")
    around(point, journal_file.Rewriting, "replace", "", "after a new file took its place")
    journal.COMPACT_BYTES = 1000


async def main(folder: Path, file: int, read: int, point: Point) -> None:
    rng, now = random.Random(), [1000.0]
    clock = Clock(lambda: now[0], lambda: 1_700_000_000.0 + now[0])
    tracker = UsageTracker(10)
    bounds = JournalBounds(100_000, 2**28)
    made = Accounting(folder, f"boot-{os.getpid()}", tracker, clock, rows=32, bounds=bounds)
    made.open(Device("cpu", 2, 2000, 5000))
    live: list[tuple[LiveRequest, int]] = []
    for number in range(100_000):
        now[0] += rng.random() * 3
        if len(live) < 8:
            attempt = f"attempt-{os.getpid()}-{number}"
            account = tracker.of(f"uid-{number % 3}", f"demo/adapter-{number % 3}") if number % 4 else tracker.base
            live.append((made.begin(Asked(attempt), account, [attempt], 1), 0))
        at = rng.randrange(len(live))
        request, tokens = live.pop(at)
        if tokens and rng.random() < 0.2:
            usage = Usage(prompt_tokens=10, cached_tokens=2, completion_tokens=tokens)
            request.account.count(Outcome.COMPLETED, usage, request.gpu_ns)
            made.end(request, Outcome.COMPLETED, usage)
        else:
            os.write(file, f"{request.asked.attempt}\n".encode())
            request.count(0, 10, 2, tokens + 1)
            live.append((request, tokens + 1))
            point.come_to("a token")
            began = clock.now_ns()
            now[0] += 0.001
            made.step(began, began + 10**6, [(request.ids[0], 10**6)])
        if number % 20 == 0:
            made.tick()
            await made.journal.keep_on_disk()
        if number % 60 == 59:  # a reader, which keeps a page before it acknowledges most of it
            page = UsagePage.model_validate_json(made.journal.page(made._boot_id, 0, 0)).records[:-10]
            for one in page:
                os.write(read, one.model_dump_json(by_alias=True).encode() + b"\n")
            made.acknowledge(made._boot_id, page[-1].seq if page else 0)
            point.come_to("after an acknowledgement")


if __name__ == "__main__":
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    pages = os.open(sys.argv[2] + ".read", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    chosen = Point(sys.argv[3], int(sys.argv[4]))
    patch(chosen)
    asyncio.run(main(Path(sys.argv[1]), log, pages, chosen))
