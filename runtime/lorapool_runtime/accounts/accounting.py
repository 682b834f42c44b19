"""Keeps the accounts of this process and records them for the ledger: requests, minutes, loads and checkpoints.

A request is a row in the running table while the engine has it, and a record when it has ended. The accounts are
counted apart from the records, so that the ledger can compare the two. Everything is called on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lorapool_api.protocol import EventType, RuntimeEvent, Usage
from lorapool_api.usage_protocol import (
    CHECKPOINT_RECORDS,
    BootRecord,
    CheckpointRecord,
    Ended,
    EndRecord,
    MinuteRecord,
    RequestRecord,
    ResidencyRecord,
    ResidencyType,
    RuntimeRecord,
)
from lorapool_runtime.accounts import journal_file
from lorapool_runtime.accounts.journal import Journal, JournalBounds
from lorapool_runtime.accounts.live_request import Asked, LiveRequest
from lorapool_runtime.accounts.minutes import Minute, Minutes
from lorapool_runtime.accounts.recovery import OUTCOMES, recover
from lorapool_runtime.accounts.running_table import (
    CACHED,
    COMPLETION,
    ENDED_SEQ,
    LAST_SEQ,
    OUTCOME,
    PROMPT,
    SPAN_SEQ,
    RunningTable,
)
from lorapool_runtime.accounts.usage import AdapterUsage, Outcome, UsageTracker
from lorapool_runtime.clock import Clock
from lorapool_runtime.events import Changes

log = logging.getLogger(__name__)

TICK_S = 1.0
"""Time between two signs of life of an idle process."""
KEEP_ENDED_S = 900.0
KEEP_ENDED = 100_000
"""Requests whose usage is known after their end, for a gateway that lost the connection."""
READER_S = 120.0
"""A ledger that has read within this time is waited for at the end."""
READ_OUT_S = 3.0
"""For so long."""

_RESIDENCY = {
    EventType.LOADED: ResidencyType.LOADED,
    EventType.UNLOADED: ResidencyType.UNLOADED,
    EventType.LOAD_FAILED: ResidencyType.FAILED,
}


@dataclass(frozen=True, slots=True)
class Device:
    """What the process uses of its device; see `BootRecord`."""

    name: str = ""
    slots: int = 0
    slot_bytes: int = 0
    device_bytes: int = 0


class Accounting:
    def __init__(
        self,
        folder: Path | None,
        boot_id: str,
        accounts: UsageTracker,
        clock: Clock,
        *,
        rows: int,
        bounds: JournalBounds,
    ) -> None:
        """Takes over what earlier processes have left in `folder`; None: in memory alone.

        `rows`: requests that the engine has at one time.
        """
        self._boot_id, self._accounts, self._clock = boot_id, accounts, clock
        self.changes = Changes()
        found = recover(folder, boot_id)
        if found.error:
            log.warning(
                "the folder for usage records cannot be used; they are kept in memory alone",
                extra={"folder": str(folder), "error": found.error},
            )
        self._path = found.path
        self.journal = Journal(boot_id, found.path, found.earlier, bounds, self._announce)
        self.journal.stats.damaged_lines += found.damaged
        self.journal.stats.write_errors += bool(found.error)
        self._rows = rows
        self._started_ns, self._started_unix_ms = clock.now_ns(), clock.unix_ms()
        self._table: RunningTable | None = None
        self._minutes: Minutes | None = None
        self._live: dict[str, LiveRequest] = {}
        self._ended: OrderedDict[str, tuple[float, Usage]] = OrderedDict()
        self._changed: set[AdapterUsage] = set()
        self._since_checkpoint = 0
        self._seqs = count(1)
        self._read_s: float | None = None
        self._warned_of_rows = False

    # --- life ---------------------------------------------------------------------------

    def open(self, device: Device) -> None:
        """Begins the records of this process. The time since it was made counts as its uptime."""
        self._table = table = self._make_table()
        started_ms = self._started_unix_ms
        self._minutes = Minutes(table, self._clock, started_ns=self._started_ns, on_minute=self._on_minute)
        self._minutes.sign_of_life(self._clock.now_ns())
        self._append(
            BootRecord(
                seq=next(self._seqs),
                started_unix_ms=started_ms,
                device=device.name,
                slots=device.slots,
                slot_bytes=device.slot_bytes,
                device_bytes=device.device_bytes,
            )
        )

    def _make_table(self) -> RunningTable:
        if self._path is not None:
            try:
                return RunningTable(journal_file.table_path(self._path), self._boot_id, self._rows)
            except OSError as error:
                log.warning(
                    "requests that run are not on the disk: what they used is not known if this process is killed",
                    extra={"error": str(error)},
                )
        return RunningTable(None, self._boot_id, self._rows)

    async def run(self) -> None:
        """Gives signs of life, ends minutes and keeps the disk up to date, until it is cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()
            await self.journal.keep_on_disk()

    def tick(self) -> None:
        if self._minutes is not None:
            now_ns = self._clock.now_ns()
            self._minutes.sign_of_life(now_ns)
            if not self._live:  # else a step may run, which the minute lasts for
                self._minutes.close_until(now_ns)

    async def close(self) -> None:
        """Writes the last records of this process, and lets a ledger that reads them have them."""
        if self._minutes is not None and self._table is not None:
            for live in dict.fromkeys(self._live.values()):  # the engine did not stop in time
                live.account.count(Outcome.FAILED, live.computed, live.gpu_ns)
                self.end(live, Outcome.FAILED, live.computed)
            self._minutes.end(self._clock.now_ns())
            self._minutes = None
            self._append(EndRecord(seq=next(self._seqs), ended_unix_ms=self._clock.unix_ms()))
            self.journal.end()
            await self.journal.keep_on_disk()
            if self._path is not None and self.journal.stats.on_disk:
                journal_file.table_path(self._path).unlink(missing_ok=True)
            await self._read_out()
            self.journal.close()
        self.changes.close()

    async def _read_out(self) -> None:
        now_s = self._clock.now_s
        if self._read_s is None or now_s() - self._read_s > READER_S:
            return
        ends_s = now_s() + READ_OUT_S
        while not self.journal.all_acknowledged and (left_s := ends_s - now_s()) > 0:
            await self.changes.wait(self.changes.seq, left_s)

    # --- requests -----------------------------------------------------------------------

    def begin(self, asked: Asked, account: AdapterUsage, ids: Sequence[str], choices: int) -> LiveRequest:
        """Enters a request that is about to be submitted, with the ids of its sequences, `choices` of each prompt."""
        assert self._table is not None
        if not self._live and self._minutes is not None:
            self._minutes.close_until(self._clock.now_ns())
        live = LiveRequest(asked, account, ids, choices, self._clock.unix_ms(), memoryview(array("Q", bytes(128))))
        texts = (
            asked.attempt, asked.request_id, asked.key_uid, asked.project, account.uid, asked.digest, asked.model,
        )  # fmt: skip
        at = self._table.take(texts, sequences=len(ids), started_unix_ms=live.started_unix_ms)
        if at is not None:
            live.words, live.at = self._table.words, at
        elif not self._warned_of_rows:
            self._warned_of_rows = True
            log.warning("more requests run than the running table holds: a kill loses what the others used")
        for one in ids:
            self._live[one] = live
        return live

    def discard(self, live: LiveRequest) -> None:
        """Removes a request that the engine did not accept."""
        self._forget(live)

    def end(self, live: LiveRequest, outcome: Outcome, usage: Usage) -> None:
        """Records a request that has ended, after its account has counted it. Does nothing after `close`."""
        if self._minutes is None:
            return
        ended = Ended(outcome.value)
        asked, seq = live.asked, next(self._seqs)
        record = RequestRecord(
            seq=seq,
            attempt=asked.attempt,
            request_id=asked.request_id,
            key_uid=asked.key_uid,
            project=asked.project,
            uid=live.account.uid,
            digest=asked.digest,
            model=asked.model,
            sequences=len(live.ids),
            outcome=ended,
            started_unix_ms=live.started_unix_ms,
            ended_unix_ms=max(self._clock.unix_ms(), live.started_unix_ms),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            gpu_ns=live.gpu_ns,
        )
        words, at = live.words, live.at
        words[at + PROMPT], words[at + CACHED] = usage.prompt_tokens, usage.cached_tokens
        words[at + COMPLETION], words[at + OUTCOME] = usage.completion_tokens, OUTCOMES.index(ended)
        words[at + ENDED_SEQ] = seq
        self._changed.add(live.account)
        self._since_checkpoint += 1
        checkpoints = self._checkpoints() if self._since_checkpoint >= CHECKPOINT_RECORDS else []
        self._append(record, *checkpoints)
        self._forget(live)
        self._remember(asked.attempt, usage)

    def _forget(self, live: LiveRequest) -> None:
        for one in live.ids:
            self._live.pop(one, None)
        if self._table is not None and live.words is self._table.words:
            live.words, at = memoryview(array("Q", bytes(128))), live.at
            live.at = 0
            self._table.give_back(at)

    def _remember(self, attempt: str, usage: Usage) -> None:
        now_s = self._clock.now_s()
        self._ended.pop(attempt, None)
        self._ended[attempt] = (now_s, usage)
        while len(self._ended) > KEEP_ENDED or next(iter(self._ended.values()))[0] < now_s - KEEP_ENDED_S:
            self._ended.popitem(last=False)

    def usage_of(self, attempt: str) -> Usage | None:
        """The final usage of an attempt that ended lately; None if it is not known."""
        found = self._ended.get(attempt)
        return None if found is None else found[1]

    # --- the device ---------------------------------------------------------------------

    def step(self, began_ns: int, ended_ns: int, shares: Iterable[tuple[str, int]]) -> None:
        """Counts a step of the engine, from and to these times of the monotonic clock.

        `shares`: the time of each sequence in it, together its duration.
        """
        if self._minutes is None:
            return
        by_account: list[tuple[AdapterUsage, int]] = []
        for one, ns in shares:
            live = self._live.get(one)
            if live is None:
                by_account.append((self._accounts.base, ns))
                continue
            live.add_gpu_ns(ns)
            by_account.append((live.account, ns))
        self._minutes.step(began_ns, ended_ns, by_account)

    def residency(self, event: RuntimeEvent) -> None:
        """Records that an adapter was loaded, unloaded, or failed to load."""
        if self._minutes is None or self._table is None:
            return
        now_ns = self._counted_ns()
        if event.type is EventType.LOADED:
            account = self._accounts.of(event.uid, event.display)
            self._minutes.loaded(account, event.digest, event.device_bytes, now_ns)
        elif event.type is EventType.UNLOADED:
            self._minutes.unloaded(event.uid, event.digest, now_ns)
        self._append(
            ResidencyRecord(
                seq=next(self._seqs),
                type=_RESIDENCY[event.type],
                uid=event.uid,
                digest=event.digest,
                model=event.display,
                at_unix_ms=int(event.at_unix_s * 1000),
                device_bytes=event.device_bytes,
                took_ns=round(event.seconds * 1e9),
                reason=event.reason or "",
            )
        )

    def _counted_ns(self) -> int:
        """Now, or when the last step ended while the next one may run: minutes consist of whole steps."""
        assert self._minutes is not None
        if not self._live:
            self._minutes.close_until(self._clock.now_ns())
        return self._minutes.frontier_ns

    def _on_minute(self, minute: Minute) -> None:
        assert self._table is not None
        seq = next(self._seqs)
        record = MinuteRecord(
            seq=seq,
            minute_unix_s=minute.minute_unix_s,
            uptime_ns=minute.uptime_ns,
            busy_ns=minute.busy_ns,
            lines=minute.lines,
        )
        self._table.words[SPAN_SEQ] = seq
        self._append(record, *self._checkpoints())

    def _checkpoints(self) -> list[CheckpointRecord]:
        self._since_checkpoint = 0
        changed, self._changed = sorted(self._changed, key=lambda account: account.uid), set()
        return [
            CheckpointRecord(
                seq=next(self._seqs),
                uid=account.uid,
                requests=account.ended,
                prompt_tokens=account.past_prompt_tokens,
                cached_tokens=account.past_cached_tokens,
                completion_tokens=account.past_completion_tokens,
                gpu_ns=account.past_gpu_ns,
            )
            for account in changed
        ]

    def _append(self, *records: RuntimeRecord) -> None:
        self.journal.append(records)
        if self._table is not None:  # after the write, so that the numbers of one that a kill cut off are used again
            self._table.words[LAST_SEQ] = records[-1].seq

    # --- the ledger ---------------------------------------------------------------------

    async def poll(self, boot_id: str, after: int, wait_s: float) -> bytes:
        """A `UsagePage` as JSON, once there are records above `after` or `wait_s` have passed.

        Without a boot id, of the oldest process of which records are kept.
        """
        self._read_s = self._clock.now_s()
        boot_id = boot_id or self.journal.oldest()
        ends_s = self._clock.now_s() + wait_s
        while not self.journal.has_news(boot_id, after) and (left_s := ends_s - self._clock.now_s()) > 0:
            await self.changes.wait(self.changes.seq, left_s)
        self._read_s = self._clock.now_s()
        return self.journal.page(boot_id, after, self._clock.unix_ms())

    def acknowledge(self, boot_id: str, through: int) -> None:
        self.journal.acknowledge(boot_id, through)
        self.changes.bump()

    def _announce(self) -> None:
        self.changes.bump_soon()
