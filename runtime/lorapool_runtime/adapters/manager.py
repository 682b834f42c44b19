"""Adapters of this runtime: registered, used, parked, deleted.

Lives on the event loop; `server` and `service` call it. A request holds a `Lease` while the engine runs it; an adapter
with a lease, or that someone waits for, never leaves its slot. How adapters get into slots is `adapter_loading`'s,
what is known of them `adapter_table`'s. Refuses to serve anything but the digest that was asked for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable

from lorapool_api.common import AdapterKey
from lorapool_api.openai import CODE_QUEUE_FULL, ApiError, Conflict, RuntimeNotRegistered, TooManyRequests
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, DeleteAnswer
from lorapool_runtime.adapters.disk_store import AdapterStore
from lorapool_runtime.adapters.entry import Entry, Lease
from lorapool_runtime.adapters.host_cache import give_back_memory
from lorapool_runtime.adapters.loader import AdapterLoader, no_slot
from lorapool_runtime.adapters.registry import AdapterLimits, AdapterTable
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import Engine
from lorapool_runtime.events import Changes, EventRing
from lorapool_runtime.metrics import Metrics
from lorapool_runtime.usage import UsageTracker

log = logging.getLogger(__name__)


class AdapterManager:
    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        limits: AdapterLimits,
        *,
        boot_id: str,
        clock: Clock,
        changes: Changes,
        events: EventRing,
        metrics: Metrics,
        usage: UsageTracker,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._changes = changes
        self._table = AdapterTable(limits, boot_id=boot_id, clock=clock, changes=changes, events=events, usage=usage)
        self._entries, self._slots = self._table.entries, self._table.slots
        self._loader = AdapterLoader(self._table, engine, store, metrics, rng or random.Random())

    # --- asked --------------------------------------------------------------------------

    @property
    def slots_used(self) -> int:
        return self._slots.used

    @property
    def host_bytes(self) -> int:
        return self._table.host.bytes

    @property
    def waiting(self) -> int:
        return sum(entry.waiting for entry in self._entries.values())

    @property
    def registered(self) -> int:
        return len(self._entries)

    def reports(self) -> list[AdapterReport]:
        return [self._table.report(entry) for entry in self._entries.values()]

    def displays(self) -> dict[str, str]:
        """Display name → uid of everything that may be asked for, for the model list."""
        return {entry.descriptor.display: key.uid for key, entry in self._entries.items() if entry.deleting is None}

    def activity(self) -> tuple[list[str], list[str]]:
        """Displays of adapters with requests that run, and with requests that wait."""
        running = [entry.descriptor.display for entry in self._entries.values() if entry.leases]
        waiting = [entry.descriptor.display for entry in self._entries.values() if entry.waiting]
        return running, waiting

    def key_of_name(self, model: str) -> AdapterKey | None:
        """The newest registered digest of the one adapter that `model` names; None when none or several do."""
        exact = [entry for entry in self._admitting() if entry.descriptor.display == model]
        found = exact or [entry for entry in self._admitting() if model in entry.descriptor.names]
        if len({entry.key.uid for entry in found}) != 1:
            return None
        return found[-1].key

    def _admitting(self) -> Iterable[Entry]:
        return (entry for entry in self._entries.values() if entry.deleting is None)

    # --- registered and deleted -----------------------------------------------------------

    async def register(self, key: AdapterKey, descriptor: AdapterDescriptor) -> AdapterReport:
        """Takes note of an adapter, or of its changed descriptor; starts its load when wished. Never waits for it."""
        while (known := self._entries.get(key)) is not None and known.deleting is not None:
            await asyncio.shield(known.deleting)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._enter(key, descriptor)
        elif entry.descriptor != descriptor:
            if (entry.descriptor.source, entry.descriptor.max_bytes) != (descriptor.source, descriptor.max_bytes):
                entry.failure = None
            entry.descriptor = descriptor
            entry.usage.rename(descriptor.display)
        self._set_pinned(entry, descriptor.pinned)
        if descriptor.load or descriptor.pinned:
            self._loader.load_unasked(entry)
        self._changes.bump()
        return self._table.report(entry)

    def _enter(self, key: AdapterKey, descriptor: AdapterDescriptor) -> Entry:
        if len(self._entries) >= self._limits.max_adapters:
            self._forget_one()
        entry = Entry(
            key,
            descriptor,
            self._table.usage.register(key.uid, descriptor.display),
            since_unix_s=self._clock.unix_s(),
            used_s=self._clock.now_s(),
        )
        self._entries[key] = entry
        if self._store.on_disk(key.digest):
            self._table.on_disk.add(key.digest)
        return entry

    def _forget_one(self) -> None:
        cold = [
            entry
            for entry in self._entries.values()
            if entry.slot is None and not entry.waiting and entry.loading is None and entry.deleting is None
            and not entry.descriptor.pinned
        ]  # fmt: skip
        if not cold:
            raise TooManyRequests("This runtime knows as many adapters as it may.", code="too_many_adapters")
        self._table.remove(min(cold, key=lambda entry: entry.used_s))

    def _set_pinned(self, entry: Entry, pinned: bool) -> None:
        if pinned:
            self._table.pinned.add(entry.key)
        else:
            self._table.pinned.discard(entry.key)
        if entry.slot is not None:
            self._slots.occupant(entry.slot).pinned = pinned

    async def delete(self, key: AdapterKey) -> DeleteAnswer:
        """Stops admitting, lets running requests finish, unloads, forgets. Goes on when the caller leaves."""
        entry = self._entries.get(key)
        if entry is None:
            raise RuntimeNotRegistered(f"No adapter {key} is registered here.")
        if entry.deleting is None:
            entry.deleting = asyncio.create_task(self._delete(entry), name=f"delete {key}")
            self._changes.bump()
        return await asyncio.shield(entry.deleting)

    async def _delete(self, entry: Entry) -> DeleteAnswer:
        if entry.loading is not None:
            if entry.fetching:
                entry.loading.cancel()
            await asyncio.wait([entry.loading])
        await self._drain(entry)
        freed_host = 0
        if not self._table.digest_is_known(entry.key.digest, besides=entry):
            freed_host = self._table.host.drop(entry.key.digest)  # 0 where the slot is the same memory
        freed_device = await self._loader.unload(entry) if entry.slot is not None else 0
        if freed_host:
            give_back_memory()
        usage = entry.usage.report(self._table.boot_id, self._clock.now_s())
        self._table.remove(entry)
        self._changes.bump()
        log.info("adapter deleted", extra={"adapter": entry.descriptor.display, "digest": entry.key.digest})
        return DeleteAnswer(
            boot_id=self._table.boot_id, freed_device_bytes=freed_device, freed_host_bytes=freed_host, usage=usage
        )

    async def _drain(self, entry: Entry) -> None:
        try:
            async with asyncio.timeout(self._limits.drain_adapter_s):
                await entry.unused.wait()
        except TimeoutError:
            for lease in list(entry.leases):
                lease.abort("The adapter was deleted while this request ran.")
            await entry.unused.wait()  # the engine ends an aborted sequence within a step

    # --- used ---------------------------------------------------------------------------

    async def acquire(self, key: AdapterKey) -> Lease:
        """The adapter's slot, after its load when it is cold. Raises ApiError: unknown, failed, no slot, line full."""
        asked_s: float | None = None
        while True:
            entry = self._entries.get(key)
            if entry is None or entry.deleting is not None:
                raise RuntimeNotRegistered(f"No adapter {key} is registered here; register it and repeat.")
            if entry.usable:
                return self._lease(entry, asked_s)
            if asked_s is None:
                asked_s = self._clock.now_s()
            if entry.leaving is not None:
                await asyncio.wait([entry.leaving])
                continue
            error = await self._wait_for_load(entry)
            if error is not None:
                raise error

    def _lease(self, entry: Entry, asked_s: float | None) -> Lease:
        assert entry.slot is not None  # usable
        now_s = self._clock.now_s()
        self._slots.enter(entry.slot)
        lease = Lease(entry, entry.slot, None if asked_s is None else now_s - asked_s, self._released)
        entry.leases.add(lease)
        entry.unused.clear()
        self._touch(entry)
        self._changes.bump_soon()
        return lease

    def _released(self, entry: Entry, lease: Lease) -> None:
        self._slots.leave(lease.slot, self._clock.now_s())
        entry.leases.discard(lease)
        self._touch(entry)
        if not entry.leases:
            entry.unused.set()
        self._changes.bump_soon()

    def _touch(self, entry: Entry) -> None:
        entry.used_s = self._clock.now_s()
        entry.used_unix_s = self._clock.unix_s()
        if entry.slot is not None:
            self._slots.occupant(entry.slot).last_used_s = entry.used_s

    async def _wait_for_load(self, entry: Entry) -> ApiError | None:
        """Joins the load under way or starts one. What it raises or returns is the request's own error."""
        if entry.loading is None:
            if entry.failure is not None and (refusal := entry.failure.refusal(self._clock.now_s())) is not None:
                entry.usage.count_failed_load()
                return refusal
            if self._slots.can_admit(self._table.wanted) is None:
                return no_slot()
            self._loader.start(entry)
        elif entry.waiting >= self._limits.max_load_waiting:
            return TooManyRequests(
                f"{entry.waiting} requests wait for this adapter's load already.",
                code=CODE_QUEUE_FULL,
                retry_after_s=2,
            )
        assert entry.loading is not None  # started above or under way
        entry.waiting += 1
        self._changes.bump_soon()
        try:
            error = await asyncio.shield(entry.loading)
        finally:
            entry.waiting -= 1
            self._changes.bump_soon()
        if error is not None and entry.failure is not None and not isinstance(error, Conflict):
            entry.usage.count_failed_load()
        return error

    # --- parked -------------------------------------------------------------------------

    def sweep(self) -> None:
        """Parks the idle, drops host copies nobody needs, loads what is pinned. Called about every second."""
        now_s = self._clock.now_s()
        for entry in [entry for entry in self._entries.values() if entry.slot is not None]:
            if self._is_idle(entry, now_s):
                self._loader.unload(entry)
        for key in list(self._table.pinned):
            self._loader.load_unasked(self._entries[key])
        resident = {entry.key.digest for entry in self._entries.values() if entry.slot is not None or entry.loading}
        dropped = self._table.host.sweep(now_s, self._limits.host_idle_s, keep=resident)
        if dropped:
            self._table.left_host(dropped)
            give_back_memory()

    def _is_idle(self, entry: Entry, now_s: float) -> bool:
        return (
            entry.usable
            and not entry.leases
            and entry.waiting == 0
            and entry.key not in self._table.pinned
            and now_s - entry.used_s >= entry.descriptor.idle_after_s
        )

    async def close(self) -> None:
        """Ends loads under way. Leases are the server's business and must be released before."""
        await self._loader.close()
