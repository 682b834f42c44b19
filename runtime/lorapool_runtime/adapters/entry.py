"""One registered adapter, why its last load failed, and the leases of the requests that run on it.

`adapter_table` holds the entries; `adapters` and `adapter_loading` change them, nobody else does. A request holds a
`Lease` while the engine runs it: an adapter with a lease never leaves its slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.openai import ApiError, client_fault
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, DeleteAnswer, ErrorDetail
from lorapool_runtime.usage import AdapterUsage


class Abortable(Protocol):
    def abort(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Failure:
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
class Entry:
    """One registered adapter."""

    key: AdapterKey
    descriptor: AdapterDescriptor
    usage: AdapterUsage
    since_unix_s: float
    slot: int | None = None
    """Set while its weights are in that slot."""
    rank: int | None = None
    device_bytes: int = 0
    waiting: int = 0
    used_s: float = 0.0
    used_unix_s: float | None = None
    failure: Failure | None = None
    loading: asyncio.Task[ApiError | None] | None = None
    fetching: bool = False
    """The load is in its long, cancellable part."""
    leaving: asyncio.Task[int] | None = None
    deleting: asyncio.Task[DeleteAnswer] | None = None
    leases: set[Lease] = field(default_factory=set)
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    told: tuple[tuple[Any, ...], AdapterReport] | None = None
    """The last report, and the values it was made of."""

    def __post_init__(self) -> None:
        self.unused.set()

    @property
    def usable(self) -> bool:
        return self.slot is not None and self.leaving is None


class Lease:
    """The right of one request to run on a slot until `release`."""

    def __init__(
        self, entry: Entry, slot: int, cold_start_s: float | None, on_release: Callable[[Entry, Lease], None]
    ) -> None:
        self._entry = entry
        self._on_release = on_release
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
    def usage(self) -> AdapterUsage:
        return self._entry.usage

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
            self._on_release(self._entry, self)
