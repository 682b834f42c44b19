"""A background thread of lower priority, for work that must not delay the engine's steps.

The engine uses one to fill and to release adapter slots: page faults and the counting of pages happen there. The work
must run no torch operator, which would take the cores of the engine's threads.
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
"""Of background threads: when they compete with a decoding thread for a core they get about a third of its share."""


class BackgroundThread:
    """Runs work in the order of submission. A daemon thread: a process that ends does not wait for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, act: Callable[[], T]) -> Future[T]:
        """Runs `act` in the thread. The future gets its result or its exception."""
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
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._work.put(run)
        return future

    def _run(self) -> None:
        lower_thread_priority()
        while True:
            self._work.get()()


def lower_thread_priority() -> None:
    """Lowers the priority of the calling thread only (on Linux every thread has its own)."""
    thread_id = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread_id, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread_id)))
    except OSError as error:
        log.warning("a background thread keeps its priority: %s", error)
