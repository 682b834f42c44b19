"""The life of this runtime's adapters: registered, used by requests, unloaded when idle, deleted.

Runs on the event loop. A request holds a `Lease` while the engine runs it, and an adapter with a lease is never
unloaded. `loader` moves adapters into slots and out of them; `registry` holds the state.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

from lorapool_api.common import AdapterKey
from lorapool_api.openai import (
    CODE_QUEUE_FULL,
    ApiError,
    NoFreeSlotError,
    RuntimeNotRegisteredError,
    TooManyRequestsError,
)
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, DeleteAnswer, Preload
from lorapool_runtime.accounts.usage import UsageTracker
from lorapool_runtime.adapters.disk_store import AdapterStore
from lorapool_runtime.adapters.entry import AdapterEntry, Lease
from lorapool_runtime.adapters.loader import AdapterLoader, no_free_slot
from lorapool_runtime.adapters.registry import AdapterLimits, AdapterRegistry
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import Engine
from lorapool_runtime.events import Changes, EventRing
from lorapool_runtime.host_memory import return_free_memory
from lorapool_runtime.metrics import Metrics
from lorapool_runtime.openai.chats.chat_format import ChatFormat
from lorapool_runtime.openai.chats.chat_formats import ChatFormats

log = logging.getLogger(__name__)


class AdapterManager:
    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        formats: ChatFormats,
        limits: AdapterLimits,
        *,
        boot_id: str,
        clock: Clock,
        changes: Changes,
        events: EventRing,
        metrics: Metrics,
        usage: UsageTracker,
        on_drain: Callable[[AdapterKey], None],
        rng: random.Random | None = None,
    ) -> None:
        """`on_drain` is called when an adapter stops admitting requests."""
        self._on_drain = on_drain
        self._store = store
        self._limits = limits
        self._clock = clock
        self._changes = changes
        self._registry = AdapterRegistry(
            limits, boot_id=boot_id, clock=clock, changes=changes, events=events, usage=usage
        )
        self._loader = AdapterLoader(self._registry, engine, store, formats, metrics, on_drain, rng or random.Random())

    # --- state --------------------------------------------------------------------------

    @property
    def slots_used(self) -> int:
        return self._registry.slots_used

    @property
    def host_bytes(self) -> int:
        return self._registry.host_bytes

    @property
    def waiting(self) -> int:
        """Requests that wait for a load."""
        return sum(entry.waiting for entry in self._registry)

    @property
    def registered(self) -> int:
        return len(self._registry)

    def reports(self) -> list[AdapterReport]:
        return [self._registry.report(entry) for entry in self._registry]

    def reports_since(self, seq: int) -> tuple[list[AdapterReport], tuple[AdapterKey, ...]] | None:
        """The changed reports and the removed adapters since the snapshot numbered `seq`. None: all are needed."""
        return self._registry.reports_since(seq)

    def displays(self) -> dict[str, str]:
        """Display name → uid of every adapter that requests may name."""
        return {entry.descriptor.display: entry.key.uid for entry in self._admitting()}

    def activity(self) -> tuple[list[str], list[str]]:
        """Display names of the adapters with running requests, and of those with waiting requests."""
        running = [entry.descriptor.display for entry in self._registry if entry.leases]
        waiting = [entry.descriptor.display for entry in self._registry if entry.waiting]
        return running, waiting

    def key_of_name(self, model: str) -> AdapterKey | None:
        """The newest registered digest of the one adapter that `model` names; None when none or several do."""
        exact = [entry for entry in self._admitting() if entry.descriptor.display == model]
        found = exact or [entry for entry in self._admitting() if model in entry.descriptor.names]
        if len({entry.key.uid for entry in found}) != 1:
            return None
        return found[-1].key

    def _admitting(self) -> Iterable[AdapterEntry]:
        return (entry for entry in self._registry if entry.deleting is None)

    # --- register and delete --------------------------------------------------------------

    async def register(self, key: AdapterKey, descriptor: AdapterDescriptor) -> AdapterReport:
        """Registers an adapter or changes its descriptor, and starts its load if asked to, without waiting for it."""
        while (known := self._registry.get(key)) is not None and known.deleting is not None:
            await asyncio.shield(known.deleting)
        entry = self._registry.get(key)
        if entry is None:
            entry = self._registry.add(key, descriptor, on_disk=self._store.on_disk(key.digest))
        elif entry.descriptor != descriptor:
            said = entry.descriptor.chat_hash
            entry.describe(descriptor)
            if descriptor.chat_hash != said:
                await self._loader.renew_chat(entry)
        if descriptor.load or descriptor.pinned:
            self._loader.preload(entry)
        self._changes.bump()
        return self._registry.report(entry)

    async def preload(self, items: Sequence[Preload], timeout_s: float) -> int:
        """Registers and loads these adapters, and waits until each is loaded or has failed, or for `timeout_s`.

        Returns how many are loaded.
        """
        keys = [AdapterKey(item.uid, item.digest) for item in items]
        for key, item in zip(keys, items, strict=True):
            await self.register(key, item.descriptor.model_copy(update={"load": True}))
        entries = [entry for key in keys if (entry := self._registry.get(key)) is not None]
        if loads := [entry.loading for entry in entries if entry.loading is not None]:
            await asyncio.wait(loads, timeout=timeout_s)
        return sum(self._registry.slot_of(entry) is not None for entry in entries)

    async def delete(self, key: AdapterKey) -> DeleteAnswer:
        """Stops admitting, lets running requests finish, unloads and removes. Goes on when the caller leaves."""
        entry = self._registry.get(key)
        if entry is None:
            raise RuntimeNotRegisteredError(f"No adapter {key} is registered here.")
        if entry.deleting is None:
            entry.begin_delete(asyncio.create_task(self._delete(entry), name=f"delete {key}"))
            self._on_drain(key)
            self._changes.bump()
        assert entry.deleting is not None  # begun above, or before
        return await asyncio.shield(entry.deleting)

    async def _delete(self, entry: AdapterEntry) -> DeleteAnswer:
        if entry.loading is not None:
            if entry.load_may_be_cancelled:
                entry.loading.cancel()
            await asyncio.wait([entry.loading])
        await self._drain(entry)
        freed_host = self._registry.drop_host_copy(entry)
        freed_device = await self._loader.unload(entry) if self._registry.slot_of(entry) is not None else 0
        if freed_host:
            return_free_memory()
        boot_id = self._registry.boot_id
        usage = entry.usage.report(boot_id, self._clock.now_s())
        self._registry.remove(entry)
        self._changes.bump()
        log.info("adapter deleted", extra={"adapter": entry.descriptor.display, "digest": entry.key.digest})
        return DeleteAnswer(boot_id=boot_id, freed_device_bytes=freed_device, freed_host_bytes=freed_host, usage=usage)

    async def _drain(self, entry: AdapterEntry) -> None:
        try:
            async with asyncio.timeout(self._limits.drain_adapter_s):
                await entry.unused.wait()
        except TimeoutError:
            for lease in list(entry.leases):
                lease.abort("The adapter was deleted while this request ran.")
            await entry.unused.wait()  # the engine ends an aborted sequence within a step

    # --- use ----------------------------------------------------------------------------

    async def loaded(self, key: AdapterKey, *, has_waited: bool = False) -> float | None:
        """Waits until requests may run on the adapter's slot, and starts its load if need be.

        `has_waited`: the request was accepted earlier, so that the number of others does not matter. Returns for how
        many seconds it has waited, None if the adapter was ready. Raises ApiError: not registered, failed, no slot,
        queue full.
        """
        asked_s: float | None = None
        while True:
            entry = self._registered(key)
            if self._registry.usable(entry):
                return None if asked_s is None else self._clock.now_s() - asked_s
            if asked_s is None:
                asked_s = self._clock.now_s()
                if not has_waited:
                    self._refuse_too_many(entry)
            error = await self._wait_for_slot(entry)
            if error is not None:
                raise error

    def chat_of(self, key: AdapterKey) -> ChatFormat | None:
        """How requests are written for it; None until its files were read. Raises RuntimeNotRegisteredError."""
        return self._registered(key).chat

    def display_of(self, key: AdapterKey) -> str:
        """The name that its responses report. Raises RuntimeNotRegisteredError."""
        return self._registered(key).descriptor.display

    async def renew_chats(self) -> None:
        """Applies a change of the base's chat format to the adapters that use it."""
        for entry in self._registry:
            await self._loader.renew_chat(entry)

    def lease(self, key: AdapterKey, cold_start_s: float | None) -> Lease | None:
        """A lease on the adapter's slot; None when it must be waited for again. Raises RuntimeNotRegisteredError."""
        entry = self._registered(key)
        return self._registry.lease(entry, cold_start_s) if self._registry.usable(entry) else None

    def waiting_request(self, key: AdapterKey) -> AbstractContextManager[None]:
        """Counts one more request that waits while inside. Raises RuntimeNotRegisteredError."""
        return self._registered(key).waiting_request()

    def _registered(self, key: AdapterKey) -> AdapterEntry:
        entry = self._registry.get(key)
        if entry is None or entry.deleting is not None:
            raise RuntimeNotRegisteredError(f"No adapter {key} is registered here; register it and repeat.")
        return entry

    async def _wait_for_slot(self, entry: AdapterEntry) -> ApiError | None:
        """Waits for the adapter's unload or load, whatever comes next. The result is the request's own error."""
        if entry.unloading is not None:
            await asyncio.wait([entry.unloading])
            return None
        if self._registry.draining(entry):
            return await self._wait_for_drain(entry)
        return await self._wait_for_load(entry)

    async def _wait_for_drain(self, entry: AdapterEntry) -> ApiError | None:
        """Waits until it has made room for another adapter, with a place in the queue for the next slot."""
        with entry.waiting_request():
            self._loader.queue_again(entry)
            try:
                async with asyncio.timeout(self._limits.slot_wait_s):
                    await entry.settled.wait()
            except TimeoutError:
                return no_free_slot()
        return None

    async def _wait_for_load(self, entry: AdapterEntry) -> ApiError | None:
        """Joins the load in progress or starts one. The result is the request's own error."""
        if entry.loading is None:
            if entry.failure is not None and (refusal := entry.failure.refusal(self._clock.now_s())) is not None:
                entry.count_failed_load()
                return refusal
            if not self._registry.can_get_slot():
                return no_free_slot()
            self._loader.start(entry)
        assert entry.loading is not None  # started above, or in progress
        try:
            with entry.waiting_request():
                self._changes.bump_soon()
                error = await asyncio.shield(entry.loading)
        finally:
            self._changes.bump_soon()
        if error is not None and entry.failure is not None and not isinstance(error, NoFreeSlotError):
            entry.count_failed_load()
        return error

    def _refuse_too_many(self, entry: AdapterEntry) -> None:
        if entry.waiting >= self._limits.max_load_waiting:
            raise TooManyRequestsError(
                f"{entry.waiting} requests already wait for this adapter.", code=CODE_QUEUE_FULL, retry_after_s=2
            )

    # --- idle ---------------------------------------------------------------------------

    def sweep(self) -> None:
        """Unloads idle adapters, drops idle host copies and loads pinned adapters. To be run about every second."""
        now_s = self._clock.now_s()
        for entry in self._registry:
            if self._is_idle(entry, now_s):
                self._loader.unload(entry)
        for entry in self._registry:
            if entry.descriptor.pinned:
                self._loader.preload(entry)
        self._loader.arrange_slots()
        if self._registry.drop_idle_host_copies():
            return_free_memory()

    def _is_idle(self, entry: AdapterEntry, now_s: float) -> bool:
        return (
            self._registry.usable(entry)
            and not entry.leases
            and entry.waiting == 0
            and not entry.descriptor.pinned
            and now_s - entry.used_s >= entry.descriptor.idle_after_s
        )

    async def close(self) -> None:
        """Ends the loads in progress. Every lease must be released before."""
        await self._loader.close()
