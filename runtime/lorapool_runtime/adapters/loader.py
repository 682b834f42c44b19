"""Loads adapters into slots (source → disk → host memory → slot), unloads them, and remembers failures.

There is one load per adapter at a time, however many requests wait for it. A load's task never raises: its result is
the error of every request that waits. Only the registered digest is loaded. `slot_queue` decides which adapter gets a
slot and which one makes room; here its plans are applied.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.openai import (
    CODE_DRAINING,
    ApiError,
    NoFreeSlotError,
    RuntimeNotRegisteredError,
    UnavailableError,
    client_fault,
)
from lorapool_api.protocol import Tier
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.adapters.disk_store import AdapterStore
from lorapool_runtime.adapters.entry import AdapterEntry, LoadFailure
from lorapool_runtime.adapters.fetch_queue import FetchQueue
from lorapool_runtime.adapters.registry import AdapterRegistry
from lorapool_runtime.background import lower_thread_priority
from lorapool_runtime.engines.interface import Engine, HostAdapter
from lorapool_runtime.metrics import Metrics
from lorapool_runtime.openai.chats.chat_files import ChatFiles
from lorapool_runtime.openai.chats.chat_formats import ChatFormats

log = logging.getLogger(__name__)

MAX_FETCHES = 16
"""Concurrent fetches, which the namespaces share."""
MAX_READS = 2
"""Files read and checked concurrently: this takes processor time that serving needs."""
CLOSE_GRACE_S = 10.0
"""How long `close` waits for loads and unloads in progress."""

_NO_SLOT = "Every adapter slot of this replica is in use or pinned"


class AdapterLoader:
    def __init__(
        self,
        registry: AdapterRegistry,
        engine: Engine,
        store: AdapterStore,
        formats: ChatFormats,
        metrics: Metrics,
        on_drain: Callable[[AdapterKey], None],
        rng: random.Random,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._store = store
        self._formats = formats
        self._metrics = metrics
        self._on_drain = on_drain
        self._rng = rng
        self._clock = registry.clock
        self._changes = registry.changes
        self._limits = registry.limits
        self._fetches = FetchQueue(MAX_FETCHES)
        self._fetch_turns: dict[AdapterKey, asyncio.Future[None]] = {}
        self._readers = ThreadPoolExecutor(
            MAX_READS, thread_name_prefix="read-adapter", initializer=lower_thread_priority
        )
        self._unloads: set[asyncio.Task[int]] = set()
        self._drains: set[asyncio.Task[None]] = set()
        self._grants: dict[AdapterKey, asyncio.Future[int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        registry.call_on_use(self.arrange_slots)

    # --- load ---------------------------------------------------------------------------

    def preload(self, entry: AdapterEntry) -> None:
        """Loads without a request, unless it is loaded, loading, being deleted, or its last failure forbids a try."""
        if self._registry.slot_of(entry) is not None or entry.loading is not None or entry.deleting is not None:
            return
        if entry.failure is not None and not entry.failure.retryable(self._clock.now_s()):
            return
        pinned = entry.descriptor.pinned
        if not (self._registry.can_get_slot() if pinned else self._registry.has_unused_slot()):
            self._registry.set_failed(entry, self._no_capacity(entry), emit=False)
            return
        self.start(entry)

    def start(self, entry: AdapterEntry) -> None:
        """Starts the load; `entry.loading` is its task."""
        entry.begin_load(asyncio.create_task(self._load(entry), name=f"load {entry.key}"))
        self._changes.bump()

    async def _load(self, entry: AdapterEntry) -> ApiError | None:
        """Tries once to load. Never raises: the result is the error of every request that waits."""
        started_s = self._clock.now_s()
        host_tier = self._engine.facts.host_tier
        try:
            with nullcontext() if host_tier else self._store.pinned(entry.key.digest):
                host, tier = await self._host_copy(entry)
                await self._into_slot(entry, host, started_s, tier)
        except NoFreeSlotError as error:
            if entry.descriptor.pinned:
                self._registry.set_failed(entry, self._no_capacity(entry), emit=False)
            return error
        except asyncio.CancelledError:
            if entry.deleting is not None:
                return RuntimeNotRegisteredError(f"Adapter {entry.key} was deleted while it loaded.")
            return UnavailableError("This replica is shutting down.", code=CODE_DRAINING, retry_after_s=1)
        except ArtifactError as error:
            return self._failed(entry, error.reason, error.message, error.retry_after_s)
        except Exception:
            log.exception("loading failed", extra={"adapter": entry.descriptor.display, "digest": entry.key.digest})
            message = "Loading the adapter failed in the runtime; see its log."
            return self._failed(entry, FailureReason.LOAD_FAILED, message)
        finally:
            entry.end_load()
            self._changes.bump()
            self.arrange_slots()
        return None

    async def _host_copy(self, entry: AdapterEntry) -> tuple[HostAdapter, Tier]:
        """The adapter in host memory, fetched and read if need be, and the tier it came from."""
        digest = entry.key.digest
        kept, files = self._registry.host_copy(digest), self._registry.chat_files(digest)
        if kept is not None and files is not None:
            await self._set_chat(entry, files)
            return kept, Tier.HOST
        with entry.cancellable_load(), self._store.pinned(digest):
            turn = nullcontext() if self._store.on_disk(digest) else self._fetch_turn(entry)
            async with turn:
                source, namespace = entry.descriptor.source, entry.descriptor.namespace
                stored = await self._store.fetch(digest, source, entry.descriptor.max_bytes, namespace=namespace)
            if stored.digest != digest:
                raise ArtifactError(
                    FailureReason.DIGEST_MISMATCH,
                    f"{entry.descriptor.source.uri} holds {stored.digest}, not the requested {digest}; correct "
                    "spec.source.digest or pin the revision.",
                )
            self._registry.add_disk_copy(digest)
            loop = asyncio.get_running_loop()
            await self._set_chat(entry, await loop.run_in_executor(self._readers, self._formats.read, stored.folder))
            if (host := kept) is None:
                host = await loop.run_in_executor(
                    self._readers, lambda: self._engine.read_adapter(str(stored.folder), max_rank=self._limits.max_rank)
                )
        if self._engine.facts.host_tier:
            self._registry.add_host_copy(digest, host)
        return host, stored.tier

    async def _set_chat(self, entry: AdapterEntry, files: ChatFiles) -> None:
        """Raises ArtifactError for a chat template or a tokenizer that cannot be used."""
        said = entry.descriptor
        chat = await asyncio.get_running_loop().run_in_executor(
            self._readers, self._formats.of_adapter, files, said.chat_template, said.generation
        )
        entry.set_chat(files, chat)

    async def renew_chat(self, entry: AdapterEntry) -> None:
        """Applies what its object, or the base's, says about chats now. An adapter for which that fails is unloaded."""
        if entry.chat_files is None:
            return
        try:
            await self._set_chat(entry, entry.chat_files)
        except ArtifactError as error:
            self._failed(entry, error.reason, error.message)
            if self._registry.usable(entry):
                self._make_room(entry)

    @asynccontextmanager
    async def _fetch_turn(self, entry: AdapterEntry) -> AsyncIterator[None]:
        """Waits for its turn to fetch, and ends it with the context."""
        turn = self._fetch_turns[entry.key] = asyncio.get_running_loop().create_future()
        self._fetches.join(entry.key, entry.descriptor.namespace)
        self._start_fetches()
        try:
            await asyncio.shield(turn)
            yield
        finally:
            del self._fetch_turns[entry.key]
            self._fetches.leave(entry.key)
            self._start_fetches()

    def _start_fetches(self) -> None:
        while (key := self._fetches.start_next(self._registry.is_wanted)) is not None:
            self._fetch_turns[key].set_result(None)

    async def _into_slot(self, entry: AdapterEntry, host: HostAdapter, started_s: float, tier: Tier) -> None:
        slot = await self._slot_for(entry)
        try:
            outcome = await asyncio.wrap_future(self._engine.load(slot, host))
        except BaseException:
            self._registry.release(entry)
            raise
        seconds = self._clock.now_s() - started_s
        self._registry.set_loaded(entry, rank=host.rank, device_bytes=outcome.device_bytes, load_seconds=seconds)
        self._metrics.loaded(seconds, tier)
        log.info(
            "adapter loaded",
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "seconds": round(seconds, 3)},
        )

    # --- slots --------------------------------------------------------------------------

    async def _slot_for(self, entry: AdapterEntry) -> int:
        """The slot that is allocated to it, in the order of the queue. Raises NoFreeSlotError after `slot_wait_s`."""
        granted = self._grants[entry.key] = asyncio.get_running_loop().create_future()
        self._registry.queue_for_slot(entry, ready=True)
        self.arrange_slots()
        try:
            with entry.cancellable_load():
                async with asyncio.timeout(None if entry.descriptor.pinned else self._limits.slot_wait_s):
                    return await asyncio.shield(granted)
        except BaseException as error:
            if granted.done():
                self._registry.release(entry)  # it was granted at the last moment
            if isinstance(error, TimeoutError):
                raise no_free_slot() from None
            raise
        finally:
            del self._grants[entry.key]
            self._registry.leave_slot_queue(entry)

    def queue_again(self, entry: AdapterEntry) -> None:
        """Queues an adapter for the slot that it has to give up, since requests wait for it again."""
        self._registry.queue_for_slot(entry, ready=False)
        self.arrange_slots()

    def arrange_slots(self) -> None:
        """Grants free slots and asks adapters to make room. To be called after each change of slots and waiters."""
        if self._closed:
            return
        plan = self._registry.plan_slots()
        for key, slot in plan.grants:
            self._registry.allocate(self._registry[key], slot)
            self._grants[key].set_result(slot)
            self._registry.leave_slot_queue(self._registry[key])
        for key in plan.staying:
            self._registry.stop_drain(self._registry[key])
            self._registry.leave_slot_queue(self._registry[key])
        for key in plan.leaving:
            self._make_room(self._registry[key])
        self._call_again(plan.due_s)
        if plan.staying:
            self.arrange_slots()

    def _make_room(self, entry: AdapterEntry) -> None:
        if not entry.leases:
            self.unload(entry)
        else:
            self._registry.begin_drain(entry)
            self._drains.add(task := asyncio.create_task(self._unload_unused(entry), name=f"drain {entry.key}"))
            task.add_done_callback(self._drains.discard)
        self._on_drain(entry.key)

    async def _unload_unused(self, entry: AdapterEntry) -> None:
        """Unloads it when its last request has ended, unless it may stay after all."""
        await entry.unused.wait()
        if self._registry.draining(entry):
            self.unload(entry)

    def _call_again(self, due_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if due_s is not None:
            wait_s = max(0.0, due_s - self._clock.now_s())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.arrange_slots)

    # --- failures -----------------------------------------------------------------------

    def _failed(
        self, entry: AdapterEntry, reason: FailureReason, message: str, retry_after_s: float | None = None
    ) -> ApiError:
        failure = self._failure(entry, reason, message, retry_after_s)
        self._registry.set_failed(entry, failure)
        self._metrics.load_failed(reason)
        log.warning(
            "adapter cannot be loaded: %s", message,
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "reason": reason.value},
        )  # fmt: skip
        wait_s = None if failure.retry_at_s is None else failure.retry_at_s - self._clock.now_s()
        return client_fault(reason, message, wait_s)

    def _no_capacity(self, entry: AdapterEntry) -> LoadFailure:
        return self._failure(entry, FailureReason.NO_CAPACITY, f"{_NO_SLOT}.")

    def _failure(
        self, entry: AdapterEntry, reason: FailureReason, message: str, retry_after_s: float | None = None
    ) -> LoadFailure:
        """The failure of one more attempt. A transient one is retried with exponential backoff and jitter."""
        attempts = 1 + (entry.failure.attempts if entry.failure is not None else 0)
        failure = LoadFailure(reason, message, attempts)
        if not reason.transient:
            return failure
        doubled = self._limits.retry_base_s * 2.0 ** min(attempts - 1, 20)
        wait_s = min(self._limits.retry_max_s, doubled) * self._rng.uniform(0.8, 1.0)
        wait_s = max(wait_s, retry_after_s or 0.0)
        return replace(failure, retry_at_s=self._clock.now_s() + wait_s, retry_at_unix_s=self._clock.unix_s() + wait_s)

    # --- unload -------------------------------------------------------------------------

    def unload(self, entry: AdapterEntry) -> asyncio.Task[int]:
        """Starts the unload, or returns the one in progress. The task's result is the number of bytes freed.

        The adapter must be loaded and not in use.
        """
        if entry.unloading is None:
            slot = self._registry.begin_unload(entry)
            task = asyncio.create_task(self._unload(entry, slot), name=f"unload {entry.key}")
            entry.begin_unload(task)
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)
            return task
        return entry.unloading

    async def _unload(self, entry: AdapterEntry, slot: int) -> int:
        freed = 0
        try:
            freed = await asyncio.wrap_future(self._engine.unload(slot))
        except Exception:
            log.exception("unloading failed", extra={"adapter": entry.descriptor.display, "slot": slot})
        self._registry.set_unloaded(entry)
        log.info(
            "adapter unloaded",
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "freed_bytes": freed},
        )
        self.arrange_slots()
        return freed

    async def close(self) -> None:
        """Cancels the loads in progress and waits for the unloads. Every lease must be released before."""
        self._call_again(None)
        self._closed = True
        loading = [entry.loading for entry in self._registry if entry.loading is not None]
        for task in [*loading, *self._drains]:
            task.cancel()
        pending: list[asyncio.Task[ApiError | None] | asyncio.Task[int]] = [*loading, *self._unloads]
        if pending:
            await asyncio.wait(pending, timeout=CLOSE_GRACE_S)
        self._readers.shutdown(wait=False, cancel_futures=True)


def no_free_slot() -> NoFreeSlotError:
    return NoFreeSlotError(f"{_NO_SLOT}; try another replica.", retry_after_s=1)
