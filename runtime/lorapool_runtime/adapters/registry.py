"""Which adapters are registered, where their copies are stored, which slots they occupy, and their reports.

The one owner of this state: `manager` and `loader` change it through the methods here. Slots belong to `uid@digest`,
since residency is billed per object; host and disk copies belong to the digest. It loads nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lorapool_api.common import AdapterKey
from lorapool_api.openai import TooManyRequestsError
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, AdapterState, EventType, Tier
from lorapool_runtime.accounts.usage import UsageTracker
from lorapool_runtime.adapters.deltas import ReportChanges
from lorapool_runtime.adapters.entry import AdapterEntry, Lease, LoadFailure
from lorapool_runtime.adapters.host_cache import HostCache
from lorapool_runtime.adapters.slot_queue import SlotPlan, SlotQueue
from lorapool_runtime.adapters.slot_table import SlotTable
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import HostAdapter
from lorapool_runtime.events import Changes, EventRing
from lorapool_runtime.openai.chats.chat_files import ChatFiles


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """The settings that concern adapters, with their units in the names."""

    slots: int
    max_rank: int
    host_cache_bytes: int
    host_idle_s: float
    max_load_waiting: int
    max_adapters: int
    retry_base_s: float
    retry_max_s: float
    drain_adapter_s: float
    min_residency_s: float
    slot_wait_s: float


class AdapterRegistry:
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
        self._events = events
        self._usage = usage
        self._entries: dict[AdapterKey, AdapterEntry] = {}
        self._on_disk: set[str] = set()  # digests
        self._host = HostCache(limits.host_cache_bytes)
        self._slots = SlotTable(limits.slots)
        self._slot_queue = SlotQueue(self._slots, limits.min_residency_s, limits.slot_wait_s)
        self._on_use: Callable[[], None] = lambda: None
        self._report_changes = ReportChanges(changes)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[AdapterEntry]:
        """In the order of registration."""
        return iter(list(self._entries.values()))

    def get(self, key: AdapterKey) -> AdapterEntry | None:
        return self._entries.get(key)

    def __getitem__(self, key: AdapterKey) -> AdapterEntry:
        return self._entries[key]

    # --- registration -------------------------------------------------------------------

    def add(self, key: AdapterKey, descriptor: AdapterDescriptor, *, on_disk: bool) -> AdapterEntry:
        """Registers an adapter. At the limit it first removes the longest unused one that is not loaded.

        Raises TooManyRequestsError when every adapter is loaded, pinned or waited for.
        """
        if len(self._entries) >= self.limits.max_adapters:
            self.remove(self._longest_unused())
        usage = self._usage.register(key.uid, descriptor.display)
        entry = AdapterEntry(
            key,
            descriptor,
            usage,
            since_unix_s=self.clock.unix_s(),
            used_s=self.clock.now_s(),
            on_change=self._report_changes.mark,
        )
        self._entries[key] = entry
        self._report_changes.mark(key)
        if on_disk:
            self._on_disk.add(key.digest)
        return entry

    def _longest_unused(self) -> AdapterEntry:
        cold = [
            entry
            for entry in self._entries.values()
            if self.slot_of(entry) is None and not entry.waiting and entry.loading is None and entry.deleting is None
            and not entry.descriptor.pinned
        ]  # fmt: skip
        if not cold:
            raise TooManyRequestsError(
                f"{len(self)} adapters are registered, which is this runtime's maximum; delete one first.",
                code="too_many_adapters",
            )
        return min(cold, key=lambda entry: entry.used_s)

    def remove(self, entry: AdapterEntry) -> None:
        del self._entries[entry.key]
        self._slot_queue.leave(entry.key)
        self._report_changes.remove(entry.key)
        self._usage.unregister(entry.key.uid)
        if not self._is_registered(entry.key.digest):
            self._on_disk.discard(entry.key.digest)

    def _is_registered(self, digest: str, *, except_for: AdapterEntry | None = None) -> bool:
        return any(entry.key.digest == digest and entry is not except_for for entry in self._entries.values())

    # --- copies -------------------------------------------------------------------------

    @property
    def host_bytes(self) -> int:
        return self._host.bytes

    def host_copy(self, digest: str) -> HostAdapter | None:
        return self._host.get(digest, self.clock.now_s())

    def chat_files(self, digest: str) -> ChatFiles | None:
        """What these files say about chats, if they were read for any object."""
        known = (entry.chat_files for entry in self._entries.values() if entry.key.digest == digest)
        return next((files for files in known if files is not None), None)

    def add_disk_copy(self, digest: str) -> None:
        self._on_disk.add(digest)
        self._mark_copies(digest)

    def add_host_copy(self, digest: str, adapter: HostAdapter) -> None:
        """Keeps the copy, and evicts the least recently used ones beyond the bound."""
        self._dropped_from_host(self._host.put(digest, adapter, self.clock.now_s()))
        self._mark_copies(digest)

    def _mark_copies(self, digest: str) -> None:
        """Marks the reports of all objects with these files: they share the host and the disk copy."""
        for entry in self._entries.values():
            if entry.key.digest == digest:
                self._report_changes.mark(entry.key)

    def drop_host_copy(self, entry: AdapterEntry) -> int:
        """Drops the host copy and returns the bytes freed.

        0 while another registered adapter has the same files, or a slot uses the same memory.
        """
        if self._is_registered(entry.key.digest, except_for=entry):
            return 0
        self._report_changes.mark(entry.key)
        return self._host.drop(entry.key.digest)

    def drop_idle_host_copies(self) -> bool:
        """Drops the host copies that were not used for `host_idle_s`. True when there was one."""
        in_use = {entry.key.digest for entry in self if self.slot_of(entry) is not None or entry.loading}
        dropped = self._host.sweep(self.clock.now_s(), self.limits.host_idle_s, keep=in_use)
        self._dropped_from_host(dropped)
        return bool(dropped)

    def _dropped_from_host(self, digests: Iterable[str]) -> None:
        gone = set(digests)
        for entry in self._entries.values():
            if entry.key.digest in gone and self.slot_of(entry) is None:
                entry.set_tier_since(self.clock.unix_s())
        if gone:
            self.changes.bump()

    # --- slots --------------------------------------------------------------------------

    @property
    def slots_used(self) -> int:
        return self._slots.used

    def slot_of(self, entry: AdapterEntry) -> int | None:
        """The slot that holds its weights, also while it is being unloaded."""
        return self._slots.slot_of(entry.key)

    def usable(self, entry: AdapterEntry) -> bool:
        """True when a request may start to run on its slot."""
        return self._slots.usable(entry.key)

    def draining(self, entry: AdapterEntry) -> bool:
        """True while it makes room for another adapter: no further request may start, and its unload follows."""
        return self._slots.draining(entry.key)

    def can_get_slot(self) -> bool:
        """Whether an adapter that joins the queue now can get a slot in time, where others may have to make room."""
        return not self._slot_queue.takes_too_long(self._may_leave)

    def has_unused_slot(self) -> bool:
        """Whether a slot is free, or can become free without making a request wait."""
        return self._slot_queue.has_unused_slot(wanted=self.is_wanted, may_leave=self._may_leave)

    def queue_for_slot(self, entry: AdapterEntry, *, ready: bool) -> None:
        """Queues it for a slot, `ready` when its weights are in host memory. It keeps its place in the queue."""
        self._slot_queue.join(entry.key, ready=ready)

    def call_on_use(self, arrange: Callable[[], None]) -> None:
        """Calls `arrange` when a request begins or ends to use a slot while adapters wait for one."""
        self._on_use = arrange

    def leave_slot_queue(self, entry: AdapterEntry) -> None:
        self._slot_queue.leave(entry.key)

    def plan_slots(self) -> SlotPlan:
        """Which adapter gets which slot, and which ones make room now. Changes nothing."""
        return self._slot_queue.plan(self.clock.now_s(), wanted=self.is_wanted, may_leave=self._may_leave)

    def is_wanted(self, key: AdapterKey) -> bool:
        """Whether a request waits for the adapter, or it is pinned."""
        entry = self._entries.get(key)
        return entry is not None and (entry.waiting > 0 or entry.descriptor.pinned)

    def _may_leave(self, key: AdapterKey) -> bool:
        entry = self._entries[key]
        return not entry.descriptor.pinned and entry.deleting is None

    def allocate(self, entry: AdapterEntry, slot: int) -> None:
        """Gives a free slot to an adapter whose weights are about to be loaded."""
        self._slots.allocate(slot, entry.key, self.clock.now_s())

    def release(self, entry: AdapterEntry) -> None:
        """Frees the slot of a load that failed."""
        self._slots.release(entry.key)

    def set_loaded(self, entry: AdapterEntry, *, rank: int, device_bytes: int, load_seconds: float) -> None:
        """Makes the adapter usable, counts the load and emits the event."""
        now_s = self.clock.now_s()
        self._slots.set_loaded(entry.key, now_s)
        entry.set_loaded(rank, device_bytes, now_s=now_s, unix_s=self.clock.unix_s())
        entry.usage.loaded(entry.key.digest, now_s, load_seconds)
        self._emit(EventType.LOADED, entry, seconds=load_seconds, device_bytes=device_bytes)

    def begin_drain(self, entry: AdapterEntry) -> None:
        """Lets no further request run on its slot. Raises ValueError when it is not usable."""
        self._slots.begin_drain(entry.key)
        entry.begin_drain()
        self.changes.bump()

    def stop_drain(self, entry: AdapterEntry) -> None:
        """Makes a draining adapter usable again."""
        self._slots.stop_drain(entry.key)
        entry.end_drain()
        self.changes.bump()

    def begin_unload(self, entry: AdapterEntry) -> int:
        """Makes the slot unusable and returns its number. Raises ValueError while a request runs on it."""
        return self._slots.begin_unload(entry.key)

    def set_unloaded(self, entry: AdapterEntry) -> None:
        """Frees the slot, counts the residency and emits the event."""
        now_s, device_bytes = self.clock.now_s(), entry.device_bytes
        self._slots.release(entry.key)
        entry.set_unloaded(self.clock.unix_s())
        self._host.touch(entry.key.digest, now_s)
        seconds = entry.usage.unloaded(entry.key.digest, now_s)
        self._emit(EventType.UNLOADED, entry, seconds=seconds, device_bytes=device_bytes)

    def set_failed(self, entry: AdapterEntry, failure: LoadFailure, *, emit: bool = True) -> None:
        """Records why the load failed. `emit` is False when no load was started."""
        entry.fail(failure)
        if emit:
            self._emit(EventType.LOAD_FAILED, entry, device_bytes=entry.device_bytes, reason=failure.reason.value)
        self.changes.bump()

    def _emit(
        self,
        kind: EventType,
        entry: AdapterEntry,
        *,
        seconds: float = 0.0,
        device_bytes: int,
        reason: str | None = None,
    ) -> None:
        self._events.add(
            kind,
            entry.key,
            display=entry.descriptor.display,
            at_unix_s=self.clock.unix_s(),
            seconds=seconds,
            device_bytes=device_bytes,
            reason=reason,
        )

    # --- leases -------------------------------------------------------------------------

    def lease(self, entry: AdapterEntry, cold_start_s: float | None) -> Lease:
        """Lets one more request run on the adapter's slot. Raises ValueError when it is not usable."""
        slot = self._slots.enter(entry.key, self.clock.now_s())
        lease = Lease(entry, slot, cold_start_s, self._release_lease)
        entry.add_lease(lease)
        entry.touch(self.clock.now_s(), self.clock.unix_s())
        self._used()
        return lease

    def _release_lease(self, entry: AdapterEntry, lease: Lease) -> None:
        self._slots.leave(entry.key, self.clock.now_s())
        entry.remove_lease(lease)
        entry.touch(self.clock.now_s(), self.clock.unix_s())
        self._used()

    def _used(self) -> None:
        self.changes.bump_soon()
        if not self._slot_queue.is_empty:
            self._on_use()

    # --- reports ------------------------------------------------------------------------

    def reports_since(self, seq: int) -> tuple[list[AdapterReport], tuple[AdapterKey, ...]] | None:
        """The changed reports and the removed adapters since the snapshot numbered `seq`. None: all are needed.

        Adapters in a slot are always among them, since their residency grows by itself.
        """
        delta = self._report_changes.since(seq)
        if delta is None:
            return None
        keys = dict.fromkeys((*delta.changed, *(occupant.key for occupant in self._slots.occupants())))
        return [self.report(self._entries[key]) for key in keys], delta.removed

    def report(self, entry: AdapterEntry) -> AdapterReport:
        """Its report, rebuilt only when a value has changed: a snapshot holds thousands of them, most unchanged."""
        now_s = self.clock.now_s()
        return entry.report(self._values(entry, now_s), lambda: self._report(entry, now_s))

    def _values(self, entry: AdapterEntry, now_s: float) -> tuple[Any, ...]:
        """Every value of a report, except for the names, which never change."""
        return (
            entry.descriptor.display,
            self._state(entry),
            self._tier(entry),
            len(entry.leases),
            entry.waiting,
            entry.descriptor.pinned,
            entry.rank,
            entry.device_bytes,
            self._host.bytes_of(entry.key.digest),
            entry.since_unix_s,
            entry.used_unix_s,
            entry.failure,
            entry.chat,
            entry.descriptor.chat_hash,
            entry.usage.values(now_s),
        )

    def _report(self, entry: AdapterEntry, now_s: float) -> AdapterReport:
        return AdapterReport(
            uid=entry.key.uid,
            digest=entry.key.digest,
            display=entry.descriptor.display,
            state=self._state(entry),
            tier=self._tier(entry),
            in_flight=len(entry.leases),
            waiting=entry.waiting,
            pinned=entry.descriptor.pinned,
            rank=entry.rank,
            device_bytes=entry.device_bytes,
            host_bytes=self._host.bytes_of(entry.key.digest),
            since_unix_s=entry.since_unix_s,
            last_used_unix_s=entry.used_unix_s,
            failure=None if entry.failure is None else entry.failure.detail(),
            chat=None if entry.chat is None else entry.chat.report,
            chat_hash=entry.descriptor.chat_hash,
            usage=entry.usage.report(self.boot_id, now_s),
        )

    def _state(self, entry: AdapterEntry) -> AdapterState:
        if entry.deleting is not None or entry.unloading is not None or self.draining(entry):
            return AdapterState.DRAINING
        if self.slot_of(entry) is not None:
            return AdapterState.LOADED
        if entry.loading is not None:
            return AdapterState.LOADING
        if entry.failure is not None:
            return AdapterState.FAILED
        return AdapterState.REGISTERED

    def _tier(self, entry: AdapterEntry) -> Tier:
        if self.slot_of(entry) is not None:
            return Tier.DEVICE
        if entry.key.digest in self._host:
            return Tier.HOST
        return Tier.DISK if entry.key.digest in self._on_disk else Tier.SOURCE
