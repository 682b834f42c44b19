"""The engine: one thread that owns torch, a queue of commands to it, and the step loop.

Commands (submit, cancel, load, unload) take effect between two steps and wait for no other request. A background thread
fills and releases slots. When the engine thread dies, every request ends with an error and
`observe().healthy` turns False: the process should exit then, nothing here restarts.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from lorapool_runtime.background import BackgroundThread
from lorapool_runtime.cgroup import usable_cores
from lorapool_runtime.engines.interface import (
    EngineStats,
    EngineStoppedError,
    FinishReason,
    GenerationRequest,
    HostAdapter,
    LoadOutcome,
    ModelFacts,
    SlotInUseError,
    StepSink,
    TokenOutput,
    TokenSink,
    ending,
)
from lorapool_runtime.engines.step_shares import split
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.weights.pack import DURING_A_BATCH, UNTHROTTLED, Throttle

__all__ = ["EngineConfig", "EngineStoppedError", "SlotInUseError", "TorchEngine"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_BATCHING_WINDOWS = 8
"""An idle engine waits for further requests for at most this many times `batching_window_s` in all."""


class TorchEngine:
    """`interface.Engine` on torch. `start` blocks until the base is loaded; everything else returns at once."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # guards _alive and _sinks, which callers share with the engine thread
        self._alive = False
        self._sinks: dict[str, TokenSink] = {}
        self._background = BackgroundThread("slot-filler")
        self._step_sink: StepSink | None = None
        self._stats = EngineStats(0, 0, 0, 0, config.slots, 0, 0, 0, healthy=True, device_bytes=0)
        # set once by the engine thread, and used by it alone
        self._core: Core | None = None

    @property
    def facts(self) -> ModelFacts:
        return self._loaded().facts

    def start(self) -> None:
        """Starts the engine thread and returns when the base is loaded; raises what loading it raised."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        ready.result()

    def stop(self, timeout_s: float) -> None:
        """Ends every request with CANCELLED, then the thread."""
        with self._lock:
            self._alive = False
        if self._thread is not None and self._thread is not threading.current_thread():
            self._commands.put(_nothing)  # wakes the thread
            self._thread.join(timeout_s)

    def read_adapter(self, folder: str, *, max_rank: int) -> HostAdapter:
        core = self._loaded()
        limit = min(max_rank, self.config.max_rank)
        return core.reader.read(Path(folder), max_rank=limit, throttle=self._throttle())

    def load(self, slot: int, adapter: HostAdapter) -> Future[LoadOutcome]:
        core = self._loaded()

        def load() -> LoadOutcome:
            if not 0 <= slot < core.slots.count or core.slots.is_published(slot):
                self._run_on_engine_thread(lambda: core.withdraw(slot)).result()
            filled = core.fill(slot, adapter)
            return self._run_on_engine_thread(lambda: core.publish(filled)).result()

        return self._background.submit(load)

    def unload(self, slot: int) -> Future[int]:
        core = self._loaded()

        def unload() -> int:
            self._run_on_engine_thread(lambda: core.withdraw(slot)).result()
            return core.slots.release(slot)

        return self._background.submit(unload)

    def submit(self, request: GenerationRequest, sink: TokenSink) -> None:
        core = self._loaded()
        core.check(request)
        constraint = core.constraint_of(request)
        with self._lock:
            if request.request_id in self._sinks:
                raise ValueError(f"request {request.request_id} is running already")
            alive = self._alive
            if alive:
                self._sinks[request.request_id] = sink
                self._commands.put(lambda: self._deliver(core.add(request, constraint)))
        if not alive:
            sink(ending(request, 0, FinishReason.ERROR, "the engine is not running"))

    def cancel(self, request_id: str) -> None:
        core = self._loaded()
        with self._lock:
            known = self._alive and request_id in self._sinks
        if known:
            self._commands.put(lambda: self._report(core.end(request_id, FinishReason.CANCELLED)))

    def report_steps(self, sink: StepSink) -> None:
        self._step_sink = sink

    def observe(self) -> EngineStats:
        return self._stats

    def _throttle(self) -> Throttle:
        return DURING_A_BATCH if self._stats.running or self._stats.waiting else UNTHROTTLED

    # --- the engine thread -------------------------------------------------------------------

    def _run(self, ready: Future[None]) -> None:
        try:
            torch.set_num_threads(self.config.threads or usable_cores())
            with torch.no_grad():
                self._core = core = Core(self.config)
        except BaseException as error:
            self._stats = _unhealthy(self._stats)
            ready.set_exception(error)
            return
        self._publish(core)
        self._alive = True
        ready.set_result(None)
        try:
            with torch.inference_mode():
                self._loop(core)
        except BaseException:
            log.exception("the engine thread died")
            self._stats = _unhealthy(self._stats)
            self._end_all(core, FinishReason.ERROR, "the engine failed")
        else:
            self._end_all(core, FinishReason.CANCELLED, None)

    def _loop(self, core: Core) -> None:
        while self._alive:
            idle = not core.scheduler.has_work
            self._take_commands(wait=idle)
            if idle and core.scheduler.has_work:
                self._wait_for_more(core)
            if core.scheduler.has_work:
                self._report(self._timed_step(core))
            else:
                self._publish(core)

    def _timed_step(self, core: Core) -> list[TokenOutput]:
        began_ns = time.monotonic_ns()
        outputs = core.step()
        ended_ns = time.monotonic_ns()
        requests, weights = core.step_weights
        if self._step_sink is not None and requests:
            shares = zip(requests, split(ended_ns - began_ns, weights), strict=True)
            self._step_sink((began_ns, ended_ns, list(shares)))
        return outputs

    def _wait_for_more(self, core: Core) -> None:
        """Keeps the batching window open after the first request; see `EngineConfig.batching_window_s`."""
        ends_s = time.monotonic() + core.batching_window_s * _MAX_BATCHING_WINDOWS
        while self._alive and time.monotonic() < ends_s and len(core.scheduler.waiting) < self.config.max_batch:
            try:
                self._commands.get(timeout=core.batching_window_s)()
            except queue.Empty:
                return

    def _take_commands(self, *, wait: bool) -> None:
        try:
            command = self._commands.get(block=wait)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _run_on_engine_thread(self, act: Callable[[], T]) -> Future[T]:
        """Runs `act` in the engine thread between two steps. The future gets its result or its exception."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if not self._alive:
                future.set_exception(EngineStoppedError("the engine is not running"))
                return
            try:
                result = act()
            except Exception as error:
                future.set_exception(error)
            else:
                self._publish(self._loaded())
                future.set_result(result)

        with self._lock:
            alive = self._alive
            if alive:
                self._commands.put(run)
        if not alive:
            future.set_exception(EngineStoppedError("the engine is not running"))
        return future

    def _report(self, outputs: list[TokenOutput]) -> None:
        """Publishes the counts before it delivers the outputs, so that `observe` includes an end a sink was given."""
        self._publish(self._loaded())
        self._deliver(outputs)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            with self._lock:
                sink = self._sinks.get(output.request_id)
                if output.finish_reason is not None:
                    self._sinks.pop(output.request_id, None)
            if sink is None:
                continue
            try:
                sink(output)
            except Exception:
                log.exception("the sink of a request failed", extra={"request_id": output.request_id})
                if output.finish_reason is None:
                    with self._lock:
                        self._sinks.pop(output.request_id, None)
                    self._loaded().end(output.request_id, FinishReason.CANCELLED)

    def _end_all(self, core: Core, reason: FinishReason, message: str | None) -> None:
        with self._lock:
            self._alive = False  # no command is queued from here on
        try:
            self._take_commands(wait=False)  # queued submits join the requests, futures get their exception
            self._deliver(core.end_all(reason, message))
        except Exception:
            log.exception("ending the requests failed")
        with self._lock:
            left = list(self._sinks)
        failed = TokenOutput("", None, False, 0, 0, finish_reason=FinishReason.ERROR, error="the engine failed")
        self._deliver([replace(failed, request_id=request_id) for request_id in left])
        if self._stats.healthy:
            self._publish(core)

    def _publish(self, core: Core) -> None:
        self._stats = core.stats()

    def _loaded(self) -> Core:
        if self._core is None:
            raise EngineStoppedError("the engine was not started")
        return self._core


def _unhealthy(stats: EngineStats) -> EngineStats:
    return replace(stats, healthy=False)


def _nothing() -> None:
    pass
