"""One process's accounting without an engine and HTTP: requests begin, count and end as a test says.

A process "killed" here leaves its files as they are and gives up its lock, as SIGKILL does.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fakes_runtime import FakeClock

from lorapool_api.protocol import EventType, RuntimeEvent, Usage
from lorapool_api.usage_protocol import (
    MinuteRecord,
    RemainderRecord,
    RequestRecord,
    RuntimeRecord,
    UsagePage,
)
from lorapool_runtime.accounts.accounting import Accounting, Device
from lorapool_runtime.accounts.journal import JournalBounds
from lorapool_runtime.accounts.live_request import Asked, LiveRequest
from lorapool_runtime.accounts.usage import Outcome, UsageTracker

COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "gpu_ns")


class Accounts:
    def __init__(self, folder: Path | None, clock: FakeClock, boot_id: str = "boot-1", **bounds: int) -> None:
        self.folder, self.boot_id, self.clock = folder, boot_id, clock
        self.tracker = UsageTracker(10)
        limits = JournalBounds(**({"records": 100_000, "bytes": 2**28} | bounds), folds=folder is not None)
        self.accounting = Accounting(folder, boot_id, self.tracker, clock.clock(), rows=16, bounds=limits)
        self.accounting.changes.bump_soon = lambda: None  # type: ignore[method-assign]  # there is no event loop
        self.accounting.open(Device("cpu", 2, 2000, 5000))
        self._made = 0

    def begin(self, uid: str = "uid-a", *, n: int = 1, key_uid: str = "key", attempt: str | None = None) -> LiveRequest:
        self._made += 1
        account = self.tracker.of(uid, f"demo/{uid}") if uid else self.tracker.base
        asked = Asked(
            attempt or f"attempt-{self.boot_id}-{self._made}", "request", key_uid, "demo", "sha256:d", "demo/m"
        )
        return self.accounting.begin(asked, account, [f"{self._made}-{number}" for number in range(n)], n)

    def end(self, live: LiveRequest, outcome: Outcome = Outcome.COMPLETED, **counts: int) -> None:
        usage = Usage(**({"prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 2} | counts))
        live.account.count(outcome, usage, live.gpu_ns)
        self.accounting.end(live, outcome, usage)

    def ask(self, uid: str = "uid-a", outcome: Outcome = Outcome.COMPLETED, **counts: int) -> None:
        self.end(self.begin(uid), outcome, **counts)

    def step(self, lives: Iterable[LiveRequest], ns: int) -> None:
        """A step that takes so long for each."""
        ids = [live.ids[0] for live in lives]
        began = self.clock.clock().now_ns()
        self.clock.pass_s(ns * len(ids) / 1e9)
        self.accounting.step(began, began + ns * len(ids), [(one, ns) for one in ids])

    def event(self, kind: EventType, uid: str, device_bytes: int = 1000) -> None:
        at = self.clock.clock().unix_s()
        self.accounting.residency(
            RuntimeEvent(
                seq=1, type=kind, uid=uid, digest="sha256:d", display=f"demo/{uid}", at_unix_s=at, seconds=1.5,
                device_bytes=device_bytes,
            )
        )  # fmt: skip

    def page(self, boot_id: str | None = None, after: int = 0) -> UsagePage:
        raw = self.accounting.journal.page(boot_id or self.boot_id, after, 0)
        return UsagePage.model_validate_json(raw)

    def records(self, boot_id: str | None = None, after: int = 0) -> list[RuntimeRecord]:
        """All records of a process, page by page."""
        found: list[RuntimeRecord] = []
        while records := self.page(boot_id, after).records:
            found += records
            after = records[-1].seq
        return found

    def kill(self) -> None:
        if self.accounting._table is not None:
            self.accounting._minutes = None
            self.accounting.journal.close()
            self.accounting._table.close()
            self.accounting._table = None
        if self.folder is not None and self.folder.exists():
            unlock(self.folder)

    def successor(self, boot_id: str = "boot-2", **bounds: int) -> Accounts:
        self.kill()
        return Accounts(self.folder, self.clock, boot_id, **bounds)


def unlock(folder: Path) -> None:
    """Gives up the locks that this process holds on the folder."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(folder / "lock"):
                fcntl.flock(int(name), fcntl.LOCK_UN)
        except OSError:
            continue


def requests_of(records: Iterable[RuntimeRecord]) -> list[RequestRecord]:
    return [record for record in records if isinstance(record, RequestRecord)]


def minutes_of(records: Iterable[RuntimeRecord]) -> list[MinuteRecord]:
    return [record for record in records if isinstance(record, MinuteRecord)]


def sums(records: Iterable[RuntimeRecord], *, up_to: int | None = None) -> dict[str, Counter[str]]:
    """Requests and counts by uid, of requests and remainders up to a number."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        if isinstance(record, RequestRecord | RemainderRecord) and (up_to is None or record.seq <= up_to):
            one: Any = found.setdefault(record.uid, Counter())
            one["requests"] += record.requests if isinstance(record, RemainderRecord) else 1
            for name in COUNTS:
                one[name] += getattr(record, name)
    return found
