"""Adapters of this runtime: registered, loaded on demand, used, parked, deleted.

Lives on the event loop; `server` calls it, it calls the engine, the store and the pure tables `slots` and `hostcache`.
A request holds a `Lease` while the engine runs it; an adapter with a lease, or that someone waits for, never leaves its
slot. One load per adapter at a time, however many wait. Slots belong to `uid@digest` (residency is billed per object);
host and disk copies belong to the digest. Refuses to serve anything but the digest that was asked for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.openai import (
    CODE_DRAINING,
    CODE_QUEUE_FULL,
    ApiError,
    Conflict,
    RuntimeNotRegistered,
    TooManyRequests,
    Unavailable,
    client_fault,
)
from lorapool_api.protocol import (
    AdapterDescriptor,
    AdapterReport,
    AdapterState,
    DeleteAnswer,
    ErrorDetail,
    EventType,
    Tier,
)
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.accounts import Account, Accounts
from lorapool_runtime.clock import Clock
from lorapool_runtime.events import Changes, EventRing
from lorapool_runtime.hostcache import HostCache, give_back_memory
from lorapool_runtime.interface import AdapterArtifactError, Engine, HostAdapter
from lorapool_runtime.metrics import Metrics
from lorapool_runtime.slots import SlotTable
from lorapool_runtime.store import AdapterStore

log = logging.getLogger(__name__)

MAX_FETCHES = 16
"""Fetches at one time: a slow source must not hold up the others for long."""
MAX_READS = 2
"""Files read and checked at one time: this costs processor time that serving needs."""
CLOSE_GRACE_S = 10.0
"""Loads and unloads under way at the end of the process are waited for so long."""


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


class Abortable(Protocol):
    def abort(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why the last load failed. `retry_at_s` None: terminal for this descriptor."""

    reason: FailureReason
    message: str
    attempts: int
    retry_at_s: float | None
    retry_at_unix_s: float | None

    def refusal(self, now_s: float) -> ApiError | None:
        """The error requests get until then; None when it may be tried (again)."""
        if self.retry_at_s is None:
            return client_fault(self.reason, self.message)
        if now_s >= self.retry_at_s or self.reason is FailureReason.NO_CAPACITY:
            return None
        return client_fault(self.reason, self.message, self.retry_at_s - now_s)

    def detail(self) -> ErrorDetail:
        return ErrorDetail(
            reason=self.reason.value,
            message=self.message[:1024],
            retry_at_unix_s=self.retry_at_unix_s,
            attempts=self.attempts,
        )


@dataclass(slots=True, eq=False)
class _Entry:
    """One registered adapter. Only the manager changes it."""

    key: AdapterKey
    descriptor: AdapterDescriptor
    account: Account
    since_unix_s: float
    slot: int | None = None
    """Set while its weights are in that slot."""
    rank: int | None = None
    device_bytes: int = 0
    waiting: int = 0
    used_s: float = 0.0
    used_unix_s: float | None = None
    failure: _Failure | None = None
    loading: asyncio.Task[ApiError | None] | None = None
    fetching: bool = False
    """The load is in its long, cancellable part."""
    leaving: asyncio.Task[int] | None = None
    deleting: asyncio.Task[DeleteAnswer] | None = None
    leases: set[Lease] = field(default_factory=set)
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def usable(self) -> bool:
        return self.slot is not None and self.leaving is None


class Lease:
    """The right of one request to run on a slot until `release`."""

    def __init__(self, manager: AdapterManager, entry: _Entry, slot: int, cold_start_s: float | None) -> None:
        self._manager = manager
        self._entry = entry
        self.slot = slot
        self.cold_start_s = cold_start_s
        """How long the request waited for the load; None when it was warm."""
        self._work: Abortable | None = None
        self._released = False

    @property
    def key(self) -> AdapterKey:
        return self._entry.key

    @property
    def display(self) -> str:
        return self._entry.descriptor.display

    @property
    def account(self) -> Account:
        return self._entry.account

    def attach(self, work: Abortable) -> None:
        """What to end when the adapter must go."""
        self._work = work

    def abort(self, message: str) -> None:
        if self._work is not None:
            self._work.abort(message)

    def release(self) -> None:
        """Gives the slot back; harmless the second time."""
        if not self._released:
            self._released = True
            self._manager._released(self._entry, self)


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
        accounts: Accounts,
        rng: random.Random | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._limits = limits
        self._boot_id = boot_id
        self._clock = clock
        self._changes = changes
        self._events = events
        self._metrics = metrics
        self._accounts = accounts
        self._rng = rng or random.Random()
        self._entries: dict[AdapterKey, _Entry] = {}
        self._pinned: set[AdapterKey] = set()
        self._on_disk: set[str] = set()
        self._host = HostCache(limits.host_cache_bytes)
        self._slots = SlotTable(limits.slots)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._readers = ThreadPoolExecutor(MAX_READS, thread_name_prefix="read-adapter")
        self._tasks: set[asyncio.Task[int]] = set()

    # --- asked --------------------------------------------------------------------------

    @property
    def slots_used(self) -> int:
        return self._slots.used

    @property
    def host_bytes(self) -> int:
        return self._host.bytes

    @property
    def waiting(self) -> int:
        return sum(entry.waiting for entry in self._entries.values())

    @property
    def registered(self) -> int:
        return len(self._entries)

    def reports(self) -> list[AdapterReport]:
        return [self._report(entry) for entry in self._entries.values()]

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

    def _admitting(self) -> Iterable[_Entry]:
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
            entry.account.display = descriptor.display
        self._set_pinned(entry, descriptor.pinned)
        if descriptor.load or descriptor.pinned:
            self._load_unasked(entry)
        self._changes.bump()
        return self._report(entry)

    def _enter(self, key: AdapterKey, descriptor: AdapterDescriptor) -> _Entry:
        if len(self._entries) >= self._limits.max_adapters:
            self._forget_one()
        entry = _Entry(
            key,
            descriptor,
            self._accounts.enter(key.uid, descriptor.display),
            since_unix_s=self._clock.unix_s(),
            used_s=self._clock.now_s(),
        )
        entry.unused.set()
        self._entries[key] = entry
        if self._store.on_disk(key.digest):
            self._on_disk.add(key.digest)
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
        self._remove(min(cold, key=lambda entry: entry.used_s))

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._pinned.discard(entry.key)
        self._accounts.leave(entry.key.uid)
        if not self._digest_is_known(entry.key.digest):
            self._on_disk.discard(entry.key.digest)

    def _set_pinned(self, entry: _Entry, pinned: bool) -> None:
        if pinned:
            self._pinned.add(entry.key)
        else:
            self._pinned.discard(entry.key)
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

    async def _delete(self, entry: _Entry) -> DeleteAnswer:
        if entry.loading is not None:
            if entry.fetching:
                entry.loading.cancel()
            await asyncio.wait([entry.loading])
        await self._drain(entry)
        freed_device = await self._unload(entry) if entry.slot is not None else 0
        freed_host = 0
        if not self._digest_is_known(entry.key.digest, besides=entry):
            freed_host = self._host.drop(entry.key.digest)
            if freed_host:
                give_back_memory()
        usage = entry.account.part(self._boot_id, self._clock.now_s())
        self._remove(entry)
        self._changes.bump()
        log.info("adapter deleted", extra={"adapter": entry.descriptor.display, "digest": entry.key.digest})
        return DeleteAnswer(
            boot_id=self._boot_id, freed_device_bytes=freed_device, freed_host_bytes=freed_host, usage=usage
        )

    async def _drain(self, entry: _Entry) -> None:
        try:
            async with asyncio.timeout(self._limits.drain_adapter_s):
                await entry.unused.wait()
        except TimeoutError:
            for lease in list(entry.leases):
                lease.abort("The adapter was deleted while this request ran.")
            await entry.unused.wait()  # the engine ends an aborted sequence within a step

    def _digest_is_known(self, digest: str, *, besides: _Entry | None = None) -> bool:
        return any(entry.key.digest == digest and entry is not besides for entry in self._entries.values())

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

    def _lease(self, entry: _Entry, asked_s: float | None) -> Lease:
        assert entry.slot is not None  # usable
        now_s = self._clock.now_s()
        self._slots.enter(entry.slot)
        lease = Lease(self, entry, entry.slot, None if asked_s is None else now_s - asked_s)
        entry.leases.add(lease)
        entry.unused.clear()
        self._touch(entry)
        self._changes.bump_soon()
        return lease

    def _released(self, entry: _Entry, lease: Lease) -> None:
        self._slots.leave(lease.slot, self._clock.now_s())
        entry.leases.discard(lease)
        self._touch(entry)
        if not entry.leases:
            entry.unused.set()
        self._changes.bump_soon()

    def _touch(self, entry: _Entry) -> None:
        entry.used_s = self._clock.now_s()
        entry.used_unix_s = self._clock.unix_s()
        if entry.slot is not None:
            self._slots.occupant(entry.slot).last_used_s = entry.used_s

    async def _wait_for_load(self, entry: _Entry) -> ApiError | None:
        """Joins the load under way or starts one. What it raises or returns is the request's own error."""
        if entry.loading is None:
            if entry.failure is not None and (refusal := entry.failure.refusal(self._clock.now_s())) is not None:
                entry.account.failed += 1
                return refusal
            if self._slots.can_admit(self._wanted) is None:
                return _no_slot()
            self._start_load(entry)
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
            entry.account.failed += 1
        return error

    def _wanted(self, key: AdapterKey) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.waiting > 0

    # --- loaded -------------------------------------------------------------------------

    def _load_unasked(self, entry: _Entry) -> None:
        """Loads without a request (PUT, pinned), unless it is there, on its way, failed, or has no room."""
        if entry.slot is not None or entry.loading is not None or entry.deleting is not None:
            return
        now_s = self._clock.now_s()
        failure = entry.failure
        if failure is not None and (failure.retry_at_s is None or now_s < failure.retry_at_s):
            return
        if self._slots.can_admit(self._wanted) is None:
            self._fail(entry, FailureReason.NO_CAPACITY, "Every adapter slot of this replica is in use or pinned.")
            return
        self._start_load(entry)

    def _start_load(self, entry: _Entry) -> None:
        entry.loading = asyncio.create_task(self._load(entry), name=f"load {entry.key}")
        self._changes.bump()

    async def _load(self, entry: _Entry) -> ApiError | None:
        """One try. Never raises: the error is the answer of everyone who waits."""
        started_s = self._clock.now_s()
        try:
            host, tier = await self._host_copy(entry)
            await self._into_slot(entry, host, started_s, tier)
        except _NoSlot:
            if entry.key in self._pinned:
                self._fail(entry, FailureReason.NO_CAPACITY, "Every adapter slot of this replica is in use or pinned.")
            return _no_slot()
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

    async def _host_copy(self, entry: _Entry) -> tuple[HostAdapter, Tier]:
        digest = entry.key.digest
        if (kept := self._host.get(digest, self._clock.now_s())) is not None:
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
            self._on_disk.add(digest)
            host = await asyncio.get_running_loop().run_in_executor(
                self._readers, lambda: self._engine.read_adapter(str(stored.folder), max_rank=self._limits.max_rank)
            )
        entry.fetching = False
        self._left_host(self._host.put(digest, host, self._clock.now_s()))
        return host, stored.tier

    async def _into_slot(self, entry: _Entry, host: HostAdapter, started_s: float, tier: Tier) -> None:
        while True:
            admission = self._slots.can_admit(self._wanted)
            if admission is None:
                raise _NoSlot
            if admission.victim is None:
                break
            await self._unload(self._entries[admission.victim])
        slot, pinned = admission.slot, entry.key in self._pinned
        self._slots.allocate(slot, entry.key, pinned=pinned, now_s=self._clock.now_s())
        try:
            outcome = await asyncio.wrap_future(self._engine.load(slot, host))
        except BaseException:
            self._slots.release(slot)
            raise
        self._slots.settle(slot)
        now_s = self._clock.now_s()
        entry.slot, entry.rank, entry.device_bytes = slot, host.rank, outcome.device_bytes
        entry.failure = None
        entry.used_s = now_s
        entry.since_unix_s = self._clock.unix_s()
        seconds = now_s - started_s
        entry.account.arrived(entry.key.digest, now_s, seconds)
        self._metrics.loaded(seconds, tier)
        self._announce(EventType.LOADED, entry, seconds=seconds)
        log.info(
            "adapter loaded",
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "seconds": round(seconds, 3)},
        )

    def _load_failed(
        self, entry: _Entry, reason: FailureReason, message: str, retry_after_s: float | None = None
    ) -> ApiError:
        failure = self._fail(entry, reason, message, retry_after_s)
        self._metrics.load_failed(reason)
        self._announce(EventType.LOAD_FAILED, entry, reason=reason.value)
        log.warning(
            "adapter cannot be loaded: %s", message,
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "reason": reason.value},
        )  # fmt: skip
        wait_s = None if failure.retry_at_s is None else failure.retry_at_s - self._clock.now_s()
        return client_fault(reason, message, wait_s)

    def _fail(self, entry: _Entry, reason: FailureReason, message: str, retry_after_s: float | None = None) -> _Failure:
        attempts = 1 + (entry.failure.attempts if entry.failure is not None else 0)
        failure = _Failure(reason, message, attempts, None, None)
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

    # --- unloaded -----------------------------------------------------------------------

    def _unload(self, entry: _Entry) -> asyncio.Task[int]:
        """Starts (or joins) taking it off its slot; the task's result is the bytes that came free."""
        if entry.leaving is None:
            assert entry.slot is not None  # callers ask first
            self._slots.begin_leaving(entry.slot)
            entry.leaving = asyncio.create_task(self._leave(entry, entry.slot), name=f"unload {entry.key}")
            self._tasks.add(entry.leaving)
            entry.leaving.add_done_callback(self._tasks.discard)
        return entry.leaving

    async def _leave(self, entry: _Entry, slot: int) -> int:
        freed = 0
        try:
            freed = await asyncio.wrap_future(self._engine.unload(slot))
        except Exception:
            log.exception("unloading failed", extra={"adapter": entry.descriptor.display, "slot": slot})
        self._slots.release(slot)
        now_s = self._clock.now_s()
        bytes_held, entry.device_bytes = entry.device_bytes, 0
        entry.slot, entry.leaving = None, None
        entry.since_unix_s = self._clock.unix_s()
        self._host.touch(entry.key.digest, now_s)
        seconds = entry.account.departed(entry.key.digest, now_s)
        self._announce(EventType.UNLOADED, entry, seconds=seconds, device_bytes=bytes_held)
        log.info(
            "adapter unloaded",
            extra={"adapter": entry.descriptor.display, "digest": entry.key.digest, "freed_bytes": freed},
        )
        return freed

    def sweep(self) -> None:
        """Parks the idle, drops host copies nobody needs, loads what is pinned. Called about every second."""
        now_s = self._clock.now_s()
        for entry in [entry for entry in self._entries.values() if entry.slot is not None]:
            if self._is_idle(entry, now_s):
                self._unload(entry)
        for key in list(self._pinned):
            self._load_unasked(self._entries[key])
        resident = {entry.key.digest for entry in self._entries.values() if entry.slot is not None or entry.loading}
        dropped = self._host.sweep(now_s, self._limits.host_idle_s, keep=resident)
        if dropped:
            self._left_host(dropped)
            give_back_memory()

    def _is_idle(self, entry: _Entry, now_s: float) -> bool:
        return (
            entry.usable
            and not entry.leases
            and entry.waiting == 0
            and entry.key not in self._pinned
            and now_s - entry.used_s >= entry.descriptor.idle_after_s
        )

    def _left_host(self, digests: Iterable[str]) -> None:
        gone = set(digests)
        for entry in self._entries.values():
            if entry.key.digest in gone and entry.slot is None:
                entry.since_unix_s = self._clock.unix_s()
        if gone:
            self._changes.bump()

    # --- told ---------------------------------------------------------------------------

    def _announce(
        self,
        kind: EventType,
        entry: _Entry,
        *,
        seconds: float = 0.0,
        device_bytes: int | None = None,
        reason: str | None = None,
    ) -> None:
        self._events.add(
            kind,
            entry.key,
            display=entry.descriptor.display,
            at_unix_s=self._clock.unix_s(),
            seconds=seconds,
            device_bytes=entry.device_bytes if device_bytes is None else device_bytes,
            reason=reason,
        )

    def _report(self, entry: _Entry) -> AdapterReport:
        return AdapterReport(
            uid=entry.key.uid,
            digest=entry.key.digest,
            display=entry.descriptor.display,
            state=self._state(entry),
            tier=self._tier(entry),
            in_flight=len(entry.leases),
            waiting=entry.waiting,
            pinned=entry.key in self._pinned,
            rank=entry.rank,
            device_bytes=entry.device_bytes,
            host_bytes=self._host.bytes_of(entry.key.digest),
            since_unix_s=entry.since_unix_s,
            last_used_unix_s=entry.used_unix_s,
            failure=None if entry.failure is None else entry.failure.detail(),
            usage=entry.account.part(self._boot_id, self._clock.now_s()),
        )

    def _state(self, entry: _Entry) -> AdapterState:
        if entry.deleting is not None or entry.leaving is not None:
            return AdapterState.DRAINING
        if entry.slot is not None:
            return AdapterState.LOADED
        if entry.loading is not None:
            return AdapterState.LOADING
        if entry.failure is not None:
            return AdapterState.FAILED
        return AdapterState.REGISTERED

    def _tier(self, entry: _Entry) -> Tier:
        if entry.slot is not None:
            return Tier.DEVICE
        if entry.key.digest in self._host:
            return Tier.HOST
        return Tier.DISK if entry.key.digest in self._on_disk else Tier.SOURCE

    # --- the end ------------------------------------------------------------------------

    async def close(self) -> None:
        """Ends loads under way. Leases are the server's business and must be released before."""
        loading = [entry.loading for entry in self._entries.values() if entry.loading is not None]
        for task in loading:
            task.cancel()
        pending: list[asyncio.Task[ApiError | None] | asyncio.Task[int]] = [*loading, *self._tasks]
        if pending:
            await asyncio.wait(pending, timeout=CLOSE_GRACE_S)
        self._readers.shutdown(wait=False, cancel_futures=True)


class _NoSlot(Exception):
    """All slots are in use, wanted or pinned."""


def _no_slot() -> Conflict:
    return Conflict("Every adapter slot of this replica is in use or pinned; try another replica.", retry_after_s=1)
