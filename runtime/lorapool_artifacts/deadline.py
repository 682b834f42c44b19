"""Runs blocking clients in threads and bounds how long a caller waits for them.

The waiter and the thread share a `Deadline`. The thread reports progress and checks whether to continue; the waiter
gives up after the idle time without progress or after the total time. A thread that hangs inside its client is
abandoned: it is a daemon, holds nothing that other threads need, and stops at its next `check()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import FetchLimits

T = TypeVar("T")

MAX_THREADS = 32
"""Concurrent blocking calls per event loop; further calls queue, within their own deadline."""

_queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


class Deadline:
    """The time that one resolve, inspection or fetch has left. Thread-safe."""

    def __init__(self, limits: FetchLimits, *, where: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.where = where
        self._clock = clock
        self._end = clock() + limits.total_timeout_s
        self._progress_at = clock()
        self._received = 0
        self._received_since: float | None = None
        self._cancelled = threading.Event()

    def progress(self) -> None:
        """Restarts the idle time: bytes arrived or a step began."""
        self._progress_at = self._clock()

    def begin_file(self) -> None:
        """Restarts the measurement of `received`."""
        self._received, self._received_since = 0, None

    def received(self, count: int) -> None:
        """Counts bytes of a file that arrived. Raises ArtifactError when fewer than the minimum arrive per second.

        The rate is measured over the idle time at least, so that a short stall does not matter.
        """
        self.progress()
        now = self._clock()
        if self._received_since is None:
            self._received_since = now
            return
        self._received += count
        seconds = now - self._received_since
        if seconds < self.limits.idle_timeout_s:
            return
        if self._received < self.limits.min_bytes_per_s * seconds:
            raise ArtifactError(
                FailureReason.SOURCE_TIMEOUT,
                f"{self.where} sent {self._received / seconds:.0f} bytes per second for {seconds:.0f} s, and at least "
                f"{self.limits.min_bytes_per_s} are required; it is retried.",
            )
        self._received, self._received_since = 0, now

    def check(self) -> None:
        """Raises ArtifactError when the caller gave up or the time is over.

        Threads check between chunks and before each side effect.
        """
        if self._cancelled.is_set():
            raise ArtifactError(FailureReason.SOURCE_TIMEOUT, f"{self.where}: the caller no longer waits for it.")
        if self._clock() >= self._end:
            raise self._too_long()

    def failure(self) -> ArtifactError | None:
        """The error with which a waiter should give up now, or None."""
        now = self._clock()
        if now >= self._end:
            return self._too_long()
        if now - self._progress_at > self.limits.idle_timeout_s:
            return self.idle_error()
        return None

    def request_timeout_s(self) -> tuple[float, float]:
        """(connect, read) timeouts in seconds for one request."""
        left_s = max(0.05, self._end - self._clock())
        return min(self.limits.connect_timeout_s, left_s), min(self.limits.idle_timeout_s, left_s)

    def pause(self, seconds: float) -> None:
        """Sleeps in the thread, and raises ArtifactError when the caller gives up meanwhile."""
        self._cancelled.wait(min(seconds, max(0.0, self._end - self._clock())))
        self.check()
        self.progress()

    def cancel(self) -> None:
        """Makes the thread stop at its next check."""
        self._cancelled.set()

    def idle_error(self) -> ArtifactError:
        """The error of a source that sent nothing for the idle time."""
        return ArtifactError(
            FailureReason.SOURCE_TIMEOUT,
            f"{self.where} sent nothing for {self.limits.idle_timeout_s:g} s; it is retried.",
        )

    def _too_long(self) -> ArtifactError:
        return ArtifactError(
            FailureReason.SOURCE_TIMEOUT,
            f"{self.where} took longer than {self.limits.total_timeout_s:g} s; it is retried.",
        )


async def in_thread(deadline: Deadline, function: Callable[[], T]) -> T:
    """Runs a blocking function in a thread and returns its result.

    Raises ArtifactError when the deadline passes. Cancelling the caller stops the thread.
    """
    loop = asyncio.get_running_loop()
    queue = _queues.setdefault(loop, asyncio.Semaphore(MAX_THREADS))
    try:
        async with asyncio.timeout(deadline.limits.total_timeout_s), queue:
            deadline.progress()
            return await _watch(deadline, _start(loop, function))
    except TimeoutError as error:
        raise deadline._too_long() from error
    finally:
        deadline.cancel()


async def _watch(deadline: Deadline, result: asyncio.Future[T]) -> T:
    poll_s = max(0.02, min(0.5, deadline.limits.idle_timeout_s / 4))
    while True:
        done, _ = await asyncio.wait((result,), timeout=poll_s)
        if done:
            return result.result()
        if (failure := deadline.failure()) is not None:
            raise failure


def _start(loop: asyncio.AbstractEventLoop, function: Callable[[], T]) -> asyncio.Future[T]:
    future: asyncio.Future[T] = loop.create_future()

    def deliver(value: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
            future.exception()  # a waiter that gave up leaves no "never retrieved" behind
        else:
            future.set_result(value)  # type: ignore[arg-type]  # T may itself be None

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = function()
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits
            loop.call_soon_threadsafe(deliver, value, error)

    threading.Thread(target=run, name="lorapool-artifacts", daemon=True).start()
    return future
