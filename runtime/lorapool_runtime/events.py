"""What long-polls wait for: the sequence number of the snapshot, and the ring of residency events.

A change costs nothing when no long-poll waits, and changes of request counts are announced a few times a second at
most.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import islice

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import EventsAnswer, EventType, RuntimeEvent

COALESCE_S = 0.2
"""Changes of counts alone are announced together after this delay."""
RING_EVENTS = 4096


class Changes:
    """A number that grows with every change, and a bounded wait for it to grow."""

    def __init__(self) -> None:
        self.seq = 1
        self._waiters: set[asyncio.Future[None]] = set()
        self._soon: asyncio.TimerHandle | None = None

    def bump(self) -> None:
        """Announces a change: wakes every waiter."""
        self.seq += 1
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def bump_soon(self) -> None:
        """Announces a change of counts within COALESCE_S, together with all changes until then."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(COALESCE_S, self.bump)

    async def wait(self, after: int, timeout_s: float) -> None:
        """Waits for a change, but at most `timeout_s`, if `after` is the present number; otherwise returns at once.

        A larger `after` is from an earlier process at this address, so it does not wait either.
        """
        if after != self.seq or timeout_s <= 0:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            self._waiters.discard(waiter)

    def close(self) -> None:
        """Cancels the delayed announcement."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None


class EventRing:
    """The last loads, unloads and failed loads, numbered from 1."""

    def __init__(
        self,
        boot_id: str,
        changes: Changes,
        *,
        size: int = RING_EVENTS,
        on_event: Callable[[RuntimeEvent], None] = lambda _event: None,
    ) -> None:
        self._boot_id = boot_id
        self._on_event = on_event
        self._changes = changes
        self._events: deque[RuntimeEvent] = deque(maxlen=size)
        self._next_seq = 1

    def add(
        self,
        kind: EventType,
        key: AdapterKey,
        *,
        display: str,
        at_unix_s: float,
        seconds: float = 0.0,
        device_bytes: int = 0,
        reason: str | None = None,
    ) -> None:
        event = RuntimeEvent(
            seq=self._next_seq,
            type=kind,
            uid=key.uid,
            digest=key.digest,
            display=display,
            at_unix_s=at_unix_s,
            seconds=seconds,
            device_bytes=device_bytes,
            reason=reason,
        )
        self._events.append(event)
        self._next_seq += 1
        self._on_event(event)
        self._changes.bump()

    @property
    def last_seq(self) -> int:
        return self._next_seq - 1

    def after(self, seq: int) -> EventsAnswer:
        """Events numbered above `seq`. `first_seq` shows whether the reader missed some."""
        first = self._events[0].seq if self._events else self._next_seq
        skip = max(0, seq + 1 - first)
        return EventsAnswer(
            boot_id=self._boot_id,
            first_seq=first,
            next_seq=self._next_seq,
            events=list(islice(self._events, skip, None)),
        )
