"""Probes that are answered while a process' event loop is busy: from a thread with an event loop of its own.

Such a thread would also answer for a loop that never runs again, so the loop leaves a heartbeat that the probes check.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

BEAT_S = 1.0

T = TypeVar("T")


class Heartbeat:
    """When an event loop last ran. Any thread may read it."""

    def __init__(self, stuck_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A loop that has not run for `stuck_s` seconds counts as stuck."""
        self._stuck_s = stuck_s
        self._clock = clock
        self._last_s = clock()

    async def run(self) -> None:
        """Beats on the running loop until it is cancelled."""
        while True:
            self._last_s = self._clock()
            await asyncio.sleep(min(BEAT_S, self._stuck_s / 4))

    @property
    def alive(self) -> bool:
        return self._clock() - self._last_s < self._stuck_s


@asynccontextmanager
async def in_own_thread(enter: Callable[[], AbstractAsyncContextManager[T]], name: str) -> AsyncIterator[T]:
    """Enters a context on the event loop of a new thread, and exits it there together with this one."""
    entered: Future[tuple[T, Callable[[], object]]] = Future()

    async def hold() -> None:
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        async with enter() as value:
            entered.set_result((value, functools.partial(loop.call_soon_threadsafe, end.set)))
            await end.wait()

    def run() -> None:
        try:
            asyncio.run(hold())
        except BaseException as error:
            if entered.done():
                raise
            entered.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    value, end = await asyncio.wrap_future(entered)
    try:
        yield value
    finally:
        end()
        await asyncio.to_thread(thread.join)
