"""What this replica knows of its adapters: which are registered, where each lies, and what is told of them.

The state that `adapters` (registry and users) and `adapter_loading` (the way into a slot and out of it) share, on the
event loop. Slots belong to `uid@digest`, since residency is billed per object; host and disk copies belong to the
digest. It loads nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import AdapterReport, AdapterState, EventType, Tier
from lorapool_runtime.adapters.entry import Entry
from lorapool_runtime.adapters.host_cache import HostCache
from lorapool_runtime.adapters.slot_table import SlotTable
from lorapool_runtime.clock import Clock
from lorapool_runtime.events import Changes, EventRing
from lorapool_runtime.usage import UsageTracker


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """The part of the settings that concerns adapters, with their units in the names."""

    slots: int
    max_rank: int
    host_cache_bytes: int
    host_idle_s: float
    max_load_waiting: int
    max_adapters: int
    retry_base_s: float
    retry_max_s: float
    drain_adapter_s: float


class AdapterTable:
    def __init__(
        self,
        limits: AdapterLimits,
        *,
        boot_id: str,
        clock: Clock,
        changes: Changes,
        events: EventRing,
        usage: UsageTracker,
    ) -> None:
        self.limits = limits
        self.boot_id = boot_id
        self.clock = clock
        self.changes = changes
        self.usage = usage
        self.entries: dict[AdapterKey, Entry] = {}
        self.pinned: set[AdapterKey] = set()
        self.on_disk: set[str] = set()
        """Digests."""
        self.host = HostCache(limits.host_cache_bytes)
        self.slots = SlotTable(limits.slots)
        self._events = events

    def wanted(self, key: AdapterKey) -> bool:
        """Whether a request waits for it."""
        entry = self.entries.get(key)
        return entry is not None and entry.waiting > 0

    def digest_is_known(self, digest: str, *, besides: Entry | None = None) -> bool:
        return any(entry.key.digest == digest and entry is not besides for entry in self.entries.values())

    def remove(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self.pinned.discard(entry.key)
        self.usage.unregister(entry.key.uid)
        if not self.digest_is_known(entry.key.digest):
            self.on_disk.discard(entry.key.digest)

    def left_host(self, digests: Iterable[str]) -> None:
        """These host copies are gone: adapters that had no nearer copy are in another tier from now on."""
        gone = set(digests)
        for entry in self.entries.values():
            if entry.key.digest in gone and entry.slot is None:
                entry.since_unix_s = self.clock.unix_s()
        if gone:
            self.changes.bump()

    # --- told ---------------------------------------------------------------------------

    def announce(
        self,
        kind: EventType,
        entry: Entry,
        *,
        seconds: float = 0.0,
        device_bytes: int | None = None,
        reason: str | None = None,
    ) -> None:
        self._events.add(
            kind,
            entry.key,
            display=entry.descriptor.display,
            at_unix_s=self.clock.unix_s(),
            seconds=seconds,
            device_bytes=entry.device_bytes if device_bytes is None else device_bytes,
            reason=reason,
        )

    def report(self, entry: Entry) -> AdapterReport:
        """Made anew only when one of its values has changed: a snapshot holds thousands, most of them at rest."""
        now_s = self.clock.now_s()
        values = self._values(entry, now_s)
        if entry.told is None or entry.told[0] != values:
            entry.told = values, self._report(entry, now_s)
        return entry.told[1]

    def _values(self, entry: Entry, now_s: float) -> tuple[Any, ...]:
        """Everything a report is made of, beside the names that never change."""
        return (
            entry.descriptor.display,
            self._state(entry),
            self._tier(entry),
            len(entry.leases),
            entry.waiting,
            entry.key in self.pinned,
            entry.rank,
            entry.device_bytes,
            self.host.bytes_of(entry.key.digest),
            entry.since_unix_s,
            entry.used_unix_s,
            entry.failure,
            entry.usage.values(now_s),
        )

    def _report(self, entry: Entry, now_s: float) -> AdapterReport:
        return AdapterReport(
            uid=entry.key.uid,
            digest=entry.key.digest,
            display=entry.descriptor.display,
            state=self._state(entry),
            tier=self._tier(entry),
            in_flight=len(entry.leases),
            waiting=entry.waiting,
            pinned=entry.key in self.pinned,
            rank=entry.rank,
            device_bytes=entry.device_bytes,
            host_bytes=self.host.bytes_of(entry.key.digest),
            since_unix_s=entry.since_unix_s,
            last_used_unix_s=entry.used_unix_s,
            failure=None if entry.failure is None else entry.failure.detail(),
            usage=entry.usage.report(self.boot_id, now_s),
        )

    def _state(self, entry: Entry) -> AdapterState:
        if entry.deleting is not None or entry.leaving is not None:
            return AdapterState.DRAINING
        if entry.slot is not None:
            return AdapterState.LOADED
        if entry.loading is not None:
            return AdapterState.LOADING
        if entry.failure is not None:
            return AdapterState.FAILED
        return AdapterState.REGISTERED

    def _tier(self, entry: Entry) -> Tier:
        if entry.slot is not None:
            return Tier.DEVICE
        if entry.key.digest in self.host:
            return Tier.HOST
        return Tier.DISK if entry.key.digest in self.on_disk else Tier.SOURCE
