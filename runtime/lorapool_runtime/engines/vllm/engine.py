"""The engine: `AsyncLLM` in a thread with an event loop of its own, and vLLM's engine process behind it.

This thread owns all state but what `observe` returns. vLLM never reads an adapter by itself: only adapters that were
loaded here, and proved to be in their slot value by value, are ever submitted. When vLLM's process dies, every request
ends with an error and `observe().healthy` turns False: the process should exit then.

An adapter that makes the model's output not finite is not served again. What it left in the KV cache is overwritten,
because attention of later requests may touch it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from lorapool_runtime.engines.errors import EngineStartError
from lorapool_runtime.engines.interface import (
    BASE_SLOT,
    EngineStats,
    EngineStoppedError,
    FinishReason,
    GenerationRequest,
    HostAdapter,
    LoadOutcome,
    ModelFacts,
    StepSink,
    TokenOutput,
    TokenSink,
    ending,
)
from lorapool_runtime.engines.request_check import check_request
from lorapool_runtime.engines.vllm.config import EngineConfig
from lorapool_runtime.engines.vllm.group import Leader
from lorapool_runtime.engines.vllm.loaded import SHUTDOWN_S, Loaded, start_vllm
from lorapool_runtime.engines.vllm.names import Vllm
from lorapool_runtime.engines.vllm.outputs import Outputs
from lorapool_runtime.engines.vllm.slots import NOT_FINITE, RefusedSlotError, excluded
from lorapool_runtime.engines.vllm.step_times import StepTimes
from lorapool_runtime.weights.pack import DURING_A_BATCH, UNTHROTTLED

log = logging.getLogger(__name__)

T = TypeVar("T")

_DIED = "the engine failed"


class VllmEngine:
    """`interface.Engine` on vLLM. `start` blocks until the base is loaded; everything else returns at once."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._vllm: Vllm | None = None
        self._known: Loaded | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._leader: Leader | None = None
        self._lock = threading.Lock()  # guards _alive and _sinks, which callers share with the engine's thread
        self._alive = False
        self._sinks: dict[str, TokenSink] = {}
        self._stats = EngineStats(0, 0, 0, 0, config.slots, 0, 0, 0, healthy=True, device_bytes=0)
        self._step_sink: StepSink | None = None
        # used by the engine's thread alone
        self._times = StepTimes(config.step_weights)
        self._ranks: dict[int, int] = {}
        """By slot, of the adapter that was loaded last."""
        self._burst: list[TokenOutput] = []
        """Outputs that vLLM returned at one time and that are not delivered yet."""
        self._requests: dict[str, int] = {}
        """Slot of each request that runs."""
        self._stopping: asyncio.Event | None = None
        self._tasks: dict[str, asyncio.Task[TokenOutput]] = {}

    @property
    def facts(self) -> ModelFacts:
        return self._loaded().facts

    def start(self) -> None:
        """Starts vLLM and returns when the base is loaded.

        Raises EngineStartError, ArtifactError, or what reading the base raises.
        """
        self._vllm = vllm = Vllm(self.config)
        ready: Future[None] = Future()
        if self.config.group is not None:
            identity = self.config.identity(vllm.version)
            self._leader = Leader(self.config.group, identity, lambda failure: self._lose(ready, failure))
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        ready.result()

    def stop(self, timeout_s: float) -> None:
        """Ends every request with CANCELLED, then vLLM's process and the thread."""
        with self._lock:
            self._alive = False
        if self._thread is not None and self._thread is not threading.current_thread():
            self._call(self._stop_loop)
            self._thread.join(timeout_s)
        if self._leader is not None:
            self._leader.close()

    def read_adapter(self, folder: str, *, max_rank: int) -> HostAdapter:
        known, busy = self._loaded(), self._stats.running or self._stats.waiting
        if folder in known.slots.excluded:
            raise excluded()
        return known.read(folder, min(max_rank, self.config.max_rank), DURING_A_BATCH if busy else UNTHROTTLED)

    def load(self, slot: int, adapter: HostAdapter) -> Future[LoadOutcome]:
        self._ranks[slot] = adapter.rank
        return self._on_loop(self._loaded().slots.load(slot, adapter))

    def unload(self, slot: int) -> Future[int]:
        return self._on_loop(self._loaded().slots.unload(slot))

    def submit(self, request: GenerationRequest, sink: TokenSink) -> None:
        known = self._loaded()
        check_request(request, known.facts, slots=self.config.slots)
        stop_ids = request.sampling.stop_token_ids
        if request.grammar is not None:  # vLLM ends no answer by itself when its grammar is complete
            stop_ids |= known.facts.eos_token_ids | known.tokenizer_end_ids
        elif not request.sampling.ignore_eos:
            stop_ids |= known.facts.eos_token_ids
        assert self._vllm is not None  # else there were no facts
        sampling = self._vllm.sampling(request.sampling, request.prompt_logprobs, request.grammar, stop_ids)
        with self._lock:
            if request.request_id in self._sinks:
                raise ValueError(f"request {request.request_id} is running already")
            alive = self._alive
            if alive:
                self._sinks[request.request_id] = sink
        if alive:
            self._call(self._begin, request, sampling, stop_ids)
        else:
            sink(ending(request, 0, FinishReason.ERROR, "the engine is not running"))

    def cancel(self, request_id: str) -> None:
        self._loaded()
        self._call(self._cancel, request_id)

    def report_steps(self, sink: StepSink) -> None:
        self._step_sink = sink

    def observe(self) -> EngineStats:
        known, stats = self._known, self._stats
        if known is not None and stats.healthy and known.llm.errored:
            return replace(stats, healthy=False)
        return stats

    # --- the engine's thread: its life -------------------------------------------------------

    def _run(self, ready: Future[None]) -> None:
        try:
            asyncio.run(self._main(ready))
        except BaseException as error:
            with self._lock:
                self._alive = False
            self._stats = replace(self._stats, healthy=False)
            with contextlib.suppress(InvalidStateError):
                ready.set_exception(error)
                return
            log.exception("the engine's thread died")
        finally:
            self._loop = None

    async def _main(self, ready: Future[None]) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        assert self._vllm is not None
        self._known = known = await start_vllm(self._vllm, self.config, self._count, self._gather)
        try:
            self._publish()
            self._alive = self._stats.healthy
            ready.set_result(None)
            await self._stopping.wait()
            while self._tasks:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.wait(list(self._tasks.values()))
                await asyncio.sleep(0)  # for `_ended`
        finally:
            self._end_all()
            known.llm.shutdown(timeout=SHUTDOWN_S)

    def _gather(self) -> None:
        if self._leader is not None:
            self._leader.wait_until_ready()
            self._leader.begin()

    def _lose(self, ready: Future[None], failure: EngineStartError) -> None:
        """Ends all requests, since the group cannot compute without the worker. vLLM would wait for it."""
        with contextlib.suppress(InvalidStateError):
            ready.set_exception(failure)
            return
        log.error("%s", failure, extra={"reason": failure.reason.value})
        with self._lock:
            self._alive = False
        self._stats = replace(self._stats, healthy=False)
        self._call(self._end_all, FinishReason.ERROR, _DIED)

    def _stop_loop(self) -> None:
        if self._stopping is not None:
            self._stopping.set()

    def _end_all(self, reason: FinishReason = FinishReason.CANCELLED, message: str | None = None) -> None:
        """Ends the requests that no task of the loop has ended."""
        self._deliver_burst()
        with self._lock:
            self._alive = False
            left = list(self._sinks)
        failed = TokenOutput("", None, False, 0, 0, finish_reason=reason, error=message)
        for request_id in left:
            self._deliver(replace(failed, request_id=request_id))

    def _call(self, act: Any, *arguments: Any) -> None:
        """Calls `act` in the engine's thread, after what was called before; not at all where it has ended."""
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(act, *arguments)
            except RuntimeError:  # the loop was closed meanwhile
                return

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs `work` in the engine's thread. The future gets its result or its exception."""
        with self._lock:
            loop = self._loop if self._alive else None
        if loop is None:
            work.close()
            future: Future[T] = Future()
            future.set_exception(EngineStoppedError("the engine is not running"))
            return future
        return asyncio.run_coroutine_threadsafe(work, loop)

    def _loaded(self) -> Loaded:
        if self._known is None:
            raise EngineStoppedError("the engine was not started")
        return self._known

    # --- requests ----------------------------------------------------------------------------

    def _begin(self, request: GenerationRequest, sampling: Any, stop_ids: frozenset[int]) -> None:
        try:
            if not self._alive:
                raise RefusedSlotError("the engine is stopping")
            lora = self._loaded().slots.enter(request.slot, request.cache_salt)
        except RefusedSlotError as refusal:
            self._deliver(ending(request, 0, FinishReason.ERROR, str(refusal)))
            return
        if not self._tasks:
            self._times.begin(time.monotonic_ns())
        self._requests[request.request_id] = request.slot
        task = self._tasks[request.request_id] = asyncio.create_task(self._generate(request, sampling, stop_ids, lora))
        task.add_done_callback(partial(self._ended, request))  # also called for a task that was cancelled at once
        self._publish()

    async def _generate(
        self, request: GenerationRequest, sampling: Any, stop_ids: frozenset[int], lora: Any
    ) -> TokenOutput:
        """Delivers all outputs of a request but the last one, and returns that."""
        outputs = Outputs(request, stop_ids)
        last = outputs.end(FinishReason.ERROR, "vLLM ended it without a reason")
        llm = self._loaded().llm
        prompt = {
            "prompt_token_ids": list(request.prompt_ids),
            "cache_salt": f"{request.cache_salt}|{request.cache_scope}",
        }
        stream = llm.generate(prompt, sampling, request.request_id, lora_request=lora)
        try:
            async for output in stream:
                if output.metrics is not None and output.metrics.is_corrupted:
                    await stream.aclose()
                    await self._loaded().slots.clean(request.slot)
                    return outputs.end(FinishReason.ERROR, NOT_FINITE)
                for made in outputs.of(output):
                    if made.finish_reason is None:
                        self._deliver_soon(made)
                    else:
                        last = made
        except asyncio.CancelledError:
            return outputs.end(FinishReason.CANCELLED, None)
        except Exception as error:
            log.error("a request failed", exc_info=error, extra={"request_id": request.request_id})
            return outputs.end(FinishReason.ERROR, _DIED if llm.errored else str(error))
        return last

    def _ended(self, request: GenerationRequest, task: asyncio.Task[TokenOutput]) -> None:
        self._loaded().slots.leave(request.slot)
        del self._tasks[request.request_id]
        self._publish()
        self._deliver_soon(ending(request, 0, FinishReason.CANCELLED, None) if task.cancelled() else task.result())

    def _cancel(self, request_id: str) -> None:
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    def _deliver_soon(self, output: TokenOutput) -> None:
        """Delivers it together with the others that vLLM has returned at this time."""
        self._burst.append(output)
        if len(self._burst) == 1:
            asyncio.get_running_loop().call_soon(self._deliver_burst)

    def _deliver_burst(self) -> None:
        outputs, self._burst = self._burst, []
        ranks = {one.request_id: self._ranks.get(self._requests.get(one.request_id, BASE_SLOT), 0) for one in outputs}
        taken = self._times.delivered(outputs, ranks, time.monotonic_ns())
        if taken is not None and self._step_sink is not None:
            self._step_sink(taken)
        for output in outputs:
            if output.finish_reason is not None:
                self._requests.pop(output.request_id, None)
            self._deliver(output)

    def _deliver(self, output: TokenOutput) -> None:
        with self._lock:
            sink = self._sinks.get(output.request_id)
            if output.finish_reason is not None:
                self._sinks.pop(output.request_id, None)
        if sink is None:
            return
        try:
            sink(output)
        except Exception:
            log.exception("the sink of a request failed", extra={"request_id": output.request_id})
            with self._lock:
                self._sinks.pop(output.request_id, None)
            self._cancel(output.request_id)

    # --- statistics --------------------------------------------------------------------------

    def _count(self, scheduler: Any, iteration: Any) -> None:
        """Adds what one step has done."""
        if self._known is None:
            return
        stats = self._stats
        if iteration is not None:
            stats = replace(
                stats,
                steps=stats.steps + 1,
                prompt_tokens=stats.prompt_tokens + iteration.num_prompt_tokens,
                generated_tokens=stats.generated_tokens + iteration.num_generation_tokens,
                preemptions=stats.preemptions + iteration.num_preempted_reqs,
            )
        if scheduler is not None:
            prefix, blocks = scheduler.prefix_cache_stats, self._known.cache_blocks
            stats = replace(
                stats,
                running=scheduler.num_running_reqs,
                kv_blocks_used=round(scheduler.kv_cache_usage * blocks),
                prefix_queried_tokens=stats.prefix_queried_tokens + prefix.queries,
                prefix_hit_tokens=stats.prefix_hit_tokens + prefix.hits,
            )
        self._stats = stats
        self._publish()

    def _publish(self) -> None:
        """Corrects vLLM's counts, which are those of its last step, by the requests that have begun or ended since."""
        known, here = self._loaded(), len(self._tasks)
        running = min(self._stats.running, here)
        self._stats = replace(
            self._stats,
            running=running,
            waiting=here - running,
            kv_blocks_total=known.cache_blocks,
            kv_blocks_used=self._stats.kv_blocks_used if here else 0,
            device_bytes=known.device_bytes,
        )
