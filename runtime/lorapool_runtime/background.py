"""A thread that fills slots with adapters, and gives slots' memory back, while the batch runs.

`engine` gives it one piece of work at a time per load or unload; in it the slow part (copying where there is something
to copy, page faults, counting pages) happens here, and only the switch from empty to full happens in the engine thread,
between two steps. It runs no torch operator, which would take the engine's cores, and at a lower priority: the batch
goes first.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

NICENESS = 5
"""Of this thread and of those that read files: about a third of a decoding thread's share of a core they both want."""


class SlotFiller:
    """Work in the order it was given. A daemon thread: a process that ends does not wait for it."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, act: Callable[[], T]) -> Future[T]:
        """Runs `act` in the thread; its exception is the future's."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = act()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="slot-filler", daemon=True)
                self._thread.start()
            self._work.put(run)
        return future

    def _run(self) -> None:
        yield_to_the_batch()
        while True:
            self._work.get()()


def yield_to_the_batch() -> None:
    """Lowers the calling thread's priority (on Linux a thread has its own)."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as error:
        log.warning("a loading thread keeps its priority: %s", error)
