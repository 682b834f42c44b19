"""One registered adapter, why its last load failed, and the leases of the requests that run on it.

Any module may read an entry's fields; only the methods of the entry change them. A request holds a `Lease` while the
engine runs it: an adapter with a lease never leaves its slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.openai import ApiError, client_fault
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, DeleteAnswer, ErrorDetail
from lorapool_runtime.accounts.usage import AdapterUsage
from lorapool_runtime.openai.chats.chat_files import ChatFiles
from lorapool_runtime.openai.chats.chat_format import ChatFormat


class Abortable(Protocol):
    def abort(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Why the last load failed. `retry_at_s` None: terminal for this descriptor."""

    reason: FailureReason
    message: str
    attempts: int
    retry_at_s: float | None = None
    retry_at_unix_s: float | None = None

    def retryable(self, now_s: float) -> bool:
        return self.retry_at_s is not None and now_s >= self.retry_at_s

    def refusal(self, now_s: float) -> ApiError | None:
        """The error of requests until the next try; None when a request may start one now."""
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
class AdapterEntry:
    key: AdapterKey
    descriptor: AdapterDescriptor
    usage: AdapterUsage
    since_unix_s: float
    """When it entered its present tier."""
    used_s: float
    """When it was last used, or registered."""
    on_change: Callable[[AdapterKey], None]
    """Is called when a value of its report may have changed."""
    used_unix_s: float | None = None
    rank: int | None = None
    device_bytes: int = 0
    chat_files: ChatFiles | None = None
    """What its files say about chats; None until they were read."""
    chat: ChatFormat | None = None
    """How requests are written for it; None until its files were read."""
    waiting: int = 0
    """Requests that wait for its load, or for their turn."""
    failure: LoadFailure | None = None
    loading: asyncio.Task[ApiError | None] | None = None
    load_may_be_cancelled: bool = False
    """True while the load fetches and reads files or waits for a slot, which may take long."""
    unloading: asyncio.Task[int] | None = None
    deleting: asyncio.Task[DeleteAnswer] | None = None
    leases: set[Lease] = field(default_factory=set)
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it has no lease."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set unless it makes room for another adapter."""
    _report: tuple[tuple[Any, ...], AdapterReport] | None = None
    """The last report, and the values that it was made of."""

    def __post_init__(self) -> None:
        self.unused.set()
        self.settled.set()

    def describe(self, descriptor: AdapterDescriptor) -> None:
        """Replaces the descriptor. Forgets the last failure if the new one may lead to other files."""
        before = self.descriptor
        if (before.source, before.max_bytes) != (descriptor.source, descriptor.max_bytes):
            self.failure = None
        if before.chat_hash != descriptor.chat_hash:
            self.failure = None
        self.descriptor = descriptor
        self.usage.rename(descriptor.display)
        self.on_change(self.key)

    def fail(self, failure: LoadFailure) -> None:
        self.failure = failure
        self.on_change(self.key)

    def touch(self, now_s: float, unix_s: float) -> None:
        """Records that a request used it now."""
        self.used_s, self.used_unix_s = now_s, unix_s
        self.on_change(self.key)

    def set_tier_since(self, unix_s: float) -> None:
        self.since_unix_s = unix_s
        self.on_change(self.key)

    def set_loaded(self, rank: int, device_bytes: int, *, now_s: float, unix_s: float) -> None:
        self.rank, self.device_bytes, self.failure = rank, device_bytes, None
        self.used_s, self.since_unix_s = now_s, unix_s
        self.on_change(self.key)

    def set_chat(self, files: ChatFiles, chat: ChatFormat) -> None:
        self.chat_files, self.chat = files, chat
        self.on_change(self.key)

    def set_unloaded(self, unix_s: float) -> None:
        self.device_bytes, self.unloading, self.since_unix_s = 0, None, unix_s
        self.settled.set()
        self.on_change(self.key)

    def begin_drain(self) -> None:
        self.settled.clear()
        self.on_change(self.key)

    def end_drain(self) -> None:
        self.settled.set()
        self.on_change(self.key)

    def count_failed_load(self) -> None:
        """Counts a request that failed because the adapter could not be loaded."""
        self.usage.count_failed_load()
        self.on_change(self.key)

    # --- tasks --------------------------------------------------------------------------

    def begin_load(self, task: asyncio.Task[ApiError | None]) -> None:
        self.loading = task
        self.on_change(self.key)

    def end_load(self) -> None:
        self.loading = None
        self.on_change(self.key)

    @contextmanager
    def cancellable_load(self) -> Iterator[None]:
        """Lets the load be cancelled while inside."""
        self.load_may_be_cancelled = True
        try:
            yield
        finally:
            self.load_may_be_cancelled = False

    def begin_unload(self, task: asyncio.Task[int]) -> None:
        self.unloading = task
        self.on_change(self.key)

    def begin_delete(self, task: asyncio.Task[DeleteAnswer]) -> None:
        self.deleting = task
        self.on_change(self.key)

    # --- requests -----------------------------------------------------------------------

    @contextmanager
    def waiting_request(self) -> Iterator[None]:
        """Counts one more request that waits for the load or for its turn while inside."""
        self._count_waiting(1)
        try:
            yield
        finally:
            self._count_waiting(-1)

    def _count_waiting(self, change: int) -> None:
        self.waiting += change
        self.on_change(self.key)

    def add_lease(self, lease: Lease) -> None:
        self.leases.add(lease)
        self.unused.clear()

    def remove_lease(self, lease: Lease) -> None:
        self.leases.discard(lease)
        if not self.leases:
            self.unused.set()

    def report(self, values: tuple[Any, ...], make: Callable[[], AdapterReport]) -> AdapterReport:
        """The last report, or a new one if one of its values has changed."""
        if self._report is None or self._report[0] != values:
            self._report = values, make()
        return self._report[1]


class Lease:
    """The right of one request to run on a slot until `release`."""

    def __init__(
        self,
        entry: AdapterEntry,
        slot: int,
        cold_start_s: float | None,
        on_release: Callable[[AdapterEntry, Lease], None],
    ) -> None:
        self._entry = entry
        self._on_release = on_release
        self.slot = slot
        self.cold_start_s = cold_start_s
        """How long the request waited for the load; None when the adapter was loaded already."""
        self._work: Abortable | None = None
        self._released = False

    @property
    def key(self) -> AdapterKey:
        return self._entry.key

    @property
    def display(self) -> str:
        return self._entry.descriptor.display

    @property
    def usage(self) -> AdapterUsage:
        return self._entry.usage

    def attach(self, work: Abortable) -> None:
        """Sets the work that `abort` aborts."""
        self._work = work

    def abort(self, message: str) -> None:
        if self._work is not None:
            self._work.abort(message)

    def release(self) -> None:
        """Releases the slot; does nothing the second time."""
        if not self._released:
            self._released = True
            self._on_release(self._entry, self)
