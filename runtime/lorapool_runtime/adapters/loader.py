"""An adapter's way into a slot and out of it: fetched, read, copied; failures remembered, with a pause between tries.

`adapters` starts loads and unloads, and requests wait for their tasks. One load per adapter at a time, however many
wait; a task never raises: its result is the answer of everyone who waits. Refuses to load anything but the digest
that was asked for, and evicts nothing that is in use, wanted or pinned.
"""

from __future__ import annotations

import asyncio
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lorapool_api.common import FailureReason
from lorapool_api.openai import CODE_DRAINING, ApiError, Conflict, RuntimeNotRegistered, Unavailable, client_fault
from lorapool_api.protocol import EventType, Tier
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.adapters.disk_store import AdapterStore
from lorapool_runtime.adapters.entry import Entry, Failure
from lorapool_runtime.adapters.registry import AdapterTable
from lorapool_runtime.background import yield_to_the_batch
from lorapool_runtime.engines.interface import AdapterArtifactError, Engine, HostAdapter
from lorapool_runtime.metrics import Metrics

log = logging.getLogger(__name__)

MAX_FETCHES = 16
"""Fetches at one time: a slow source must not hold up the others for long."""
MAX_READS = 2
"""Files read and checked at one time: this costs processor time that serving needs."""
CLOSE_GRACE_S = 10.0
"""Loads and unloads under way at the end of the process are waited for so long."""

_NO_SLOT = "Every adapter slot of this replica is in use or pinned"


class AdapterLoader:
    def __init__(
        self, table: AdapterTable, engine: Engine, store: AdapterStore, metrics: Metrics, rng: random.Random
    ) -> None:
        self._table = table
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._rng = rng
        self._clock = table.clock
        self._changes = table.changes
        self._limits = table.limits
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._readers = ThreadPoolExecutor(MAX_READS, thread_name_prefix="read-adapter", initializer=yield_to_the_batch)
        self._unloads: set[asyncio.Task[int]] = set()

    # --- in -----------------------------------------------------------------------------

    def load_unasked(self, entry: Entry) -> None:
        """Loads without a request (PUT, pinned), unless it is there, on its way, failed, or has no room."""
        if entry.slot is not None or entry.loading is not None or entry.deleting is not None:
            return
        now_s = self._clock.now_s()
        failure = entry.failure
        if failure is not None and (failure.retry_at_s is None or now_s < failure.retry_at_s):
            return
        if self._table.slots.can_admit(self._table.wanted) is None:
            self._fail(entry, FailureReason.NO_CAPACITY, f"{_NO_SLOT}.")
            return
        self.start(entry)

    def start(self, entry: Entry) -> None:
        entry.loading = asyncio.create_task(self._load(entry), name=f"load {entry.key}")
        self._changes.bump()

    async def _load(self, entry: Entry) -> ApiError | None:
        """One try. Never raises: the error is the answer of everyone who waits."""
        started_s = self._clock.now_s()
        try:
            host, tier = await self._host_copy(entry)
            await self._into_slot(entry, host, started_s, tier)
        except _NoSlotError:
            if entry.key in self._table.pinned:
                self._fail(entry, FailureReason.NO_CAPACITY, f"{_NO_SLOT}.")
            return no_slot()
        except asyncio.CancelledError:
            if entry.deleting is not None:
                return RuntimeNotRegistered(f"Adapter {entry.key} was deleted while it loaded.")
            return Unavailable("This replica is shutting down.", code=CODE_DRAINING, retry_after_s=1)
        except ArtifactError as error:
            return self._load_failed(entry, error.reason, error.message, error.retry_after_s)
        except AdapterArtifactError as error:
            return self._load_failed(entry, FailureReason(error.reason), error.message)
        except Exception:
            log.exception("loading failed", extra={"adapter": entry.descriptor.display, "digest": entry.key.digest})
            return self._load_failed(
                entry, FailureReason.LOAD_FAILED, "Loading the adapter failed in the runtime; see its log."
            )
        finally:
            entry.loading = None
            entry.fetching = False
            self._changes.bump()
        return None

    async def _host_copy(self, entry: Entry) -> tuple[HostAdapter, Tier]:
        digest = entry.key.digest
        if (kept := self._table.host.get(digest, self._clock.now_s())) is not None:
            return kept, Tier.HOST
        entry.fetching = True
        with self._store.pinned(digest):
            async with self._fetches:
                stored = await self._store.fetch(digest, entry.descriptor.source, entry.descriptor.max_bytes)
            if stored.digest != digest:
                raise ArtifactError(
                    FailureReason.DIGEST_MISMATCH,
                    f"{entry.descriptor.source.uri} holds {stored.digest}, not the {digest} that is asked for; correct "
                    "spec.source.digest or pin the revision.",
                )
            self._table.on_disk.add(digest)
            host = await asyncio.get_running_loop().run_in_executor(
                self._readers, lambda: self._engine.read_adapter(str(stored.folder), max_rank=self._limits.max_rank)
            )
        entry.fetching = False
        self._table.left_host(self._table.host.put(digest, host, self._clock.now_s()))
        return host, stored.tier

    async def _into_slot(self, entry: Entry, host: HostAdapter, started_s: float, tier: Tier) -> None:
        while True:
            admission = self._table.slots.can_admit(self._table.wanted)
            if admission is None:
                raise _NoSlotError
            if admission.victim is None:
                break
            await self.unload(self._table.entries[admission.victim])
        slot, pinned = admission.slot, entry.key in self._table.pinned
        self._table.slots.allocate(slot, entry.key, pinned=pinned, now_s=self._clock.now_s())
        try:
            outcome = await asyncio.wrap_future(self._engine.load(slot, host))
        except BaseException:
            self._table.slots.release(slot)
            raise
        self._table.slots.settle(slot)
        now_s = self._clock.now_s()
        entry.slot, entry.rank, entry.device_bytes = slot, host.rank, outcome.device_bytes
        entry.failure = None
        entry.used_s = now_s
        entry.since_unix_s = self._clock.unix_s()
        seconds = now_s - started_s
        entry.usage.loaded(entry.key.digest, now_s, seconds)
        self._metrics.loaded(seconds, tier)
        self._table.announce(EventType.LOADED, entry, seconds=seconds)
        log.info(
            "adapter loaded",
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "seconds": round(seconds, 3)},
        )

    def _load_failed(
        self, entry: Entry, reason: FailureReason, message: str, retry_after_s: float | None = None
    ) -> ApiError:
        failure = self._fail(entry, reason, message, retry_after_s)
        self._metrics.load_failed(reason)
        self._table.announce(EventType.LOAD_FAILED, entry, reason=reason.value)
        log.warning(
            "adapter cannot be loaded: %s", message,
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "reason": reason.value},
        )  # fmt: skip
        wait_s = None if failure.retry_at_s is None else failure.retry_at_s - self._clock.now_s()
        return client_fault(reason, message, wait_s)

    def _fail(self, entry: Entry, reason: FailureReason, message: str, retry_after_s: float | None = None) -> Failure:
        attempts = 1 + (entry.failure.attempts if entry.failure is not None else 0)
        failure = Failure(reason, message, attempts, None, None)
        if reason.transient:
            doubled = self._limits.retry_base_s * 2.0 ** min(attempts - 1, 20)
            wait_s = min(self._limits.retry_max_s, doubled) * self._rng.uniform(0.8, 1.0)
            wait_s = max(wait_s, retry_after_s or 0.0)
            failure = replace(
                failure, retry_at_s=self._clock.now_s() + wait_s, retry_at_unix_s=self._clock.unix_s() + wait_s
            )
        entry.failure = failure
        self._changes.bump()
        return failure

    # --- out ----------------------------------------------------------------------------

    def unload(self, entry: Entry) -> asyncio.Task[int]:
        """Starts (or joins) taking it off its slot; the task's result is the bytes that came free."""
        if entry.leaving is None:
            assert entry.slot is not None  # callers ask first
            self._table.slots.begin_leaving(entry.slot)
            entry.leaving = asyncio.create_task(self._leave(entry, entry.slot), name=f"unload {entry.key}")
            self._unloads.add(entry.leaving)
            entry.leaving.add_done_callback(self._unloads.discard)
        return entry.leaving

    async def _leave(self, entry: Entry, slot: int) -> int:
        freed = 0
        try:
            freed = await asyncio.wrap_future(self._engine.unload(slot))
        except Exception:
            log.exception("unloading failed", extra={"adapter": entry.descriptor.display, "slot": slot})
        self._table.slots.release(slot)
        now_s = self._clock.now_s()
        bytes_held, entry.device_bytes = entry.device_bytes, 0
        entry.slot, entry.leaving = None, None
        entry.since_unix_s = self._clock.unix_s()
        self._table.host.touch(entry.key.digest, now_s)
        seconds = entry.usage.unloaded(entry.key.digest, now_s)
        self._table.announce(EventType.UNLOADED, entry, seconds=seconds, device_bytes=bytes_held)
        log.info(
            "adapter unloaded",
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "freed_bytes": freed},
        )
        return freed

    async def close(self) -> None:
        """Ends loads under way. Leases are the server's business and must be released before."""
        loading = [entry.loading for entry in self._table.entries.values() if entry.loading is not None]
        for task in loading:
            task.cancel()
        pending: list[asyncio.Task[ApiError | None] | asyncio.Task[int]] = [*loading, *self._unloads]
        if pending:
            await asyncio.wait(pending, timeout=CLOSE_GRACE_S)
        self._readers.shutdown(wait=False, cancel_futures=True)


class _NoSlotError(Exception):
    """All slots are in use, wanted or pinned."""


def no_slot() -> Conflict:
    return Conflict(f"{_NO_SLOT}; try another replica.", retry_after_s=1)
