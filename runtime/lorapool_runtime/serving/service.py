"""The runtime without HTTP: takes parsed requests in, within bounds, and says what state it is in.

`__main__` makes one, hands it the loaded base, and drains it at the end; `server` calls it. It owns the list of open
requests: each holds its place in the line and its adapter's lease until the engine has ended it. Refuses work while
starting, draining, or when the line is full, before anything is accepted.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from lorapool_api.common import BASE_TARGET, HEADER_ADAPTER, AdapterKey
from lorapool_api.openai import (
    CODE_DRAINING,
    CODE_QUEUE_FULL,
    CODE_STARTING,
    InvalidRequest,
    ModelNotFound,
    TooManyRequests,
    Unavailable,
)
from lorapool_api.protocol import BaseReport, ResolveAnswer, ResolveRequest, RuntimeSnapshot
from lorapool_runtime.adapters.disk_store import AdapterStore
from lorapool_runtime.adapters.entry import Lease
from lorapool_runtime.adapters.manager import AdapterManager
from lorapool_runtime.adapters.registry import AdapterLimits
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import BASE_SLOT, Engine, EngineStats
from lorapool_runtime.events import Changes, EventRing
from lorapool_runtime.metrics import Gauges, Metrics
from lorapool_runtime.openai.detokenizer import EchoedPrompt
from lorapool_runtime.openai.generation import Ended, Generation, Mailbox, Outcome
from lorapool_runtime.openai.grammar import GrammarCompiler
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest
from lorapool_runtime.serving.submission import SequenceMaker, TextCodec, grammar_of, prompts_of, sequences_of
from lorapool_runtime.settings import RuntimeSettings
from lorapool_runtime.usage import Accounts

log = logging.getLogger(__name__)

BASE_SALT = "base"
SNAPSHOT_AGE_S = 0.5
"""Counts that change without a new number are at most so old."""


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The base, ready to serve."""

    engine: Engine
    codec: TextCodec
    grammars: GrammarCompiler
    store: AdapterStore
    digest: str | None


@dataclass(frozen=True, slots=True)
class _Serving:
    base: LoadedBase
    adapters: AdapterManager
    mailbox: Mailbox


@dataclass(frozen=True, slots=True)
class Running:
    """A request the engine has taken: what `server` needs to answer it."""

    generation: Generation
    sequences: int
    echo: tuple[EchoedPrompt, ...]
    target: str
    """For the answer's header: `<namespace>/<name>@<digest>` or `base`."""
    cold_start_s: float | None
    fingerprint: str


class Runtime:
    def __init__(self, settings: RuntimeSettings, *, clock: Clock | None = None, boot_id: str | None = None) -> None:
        self.settings = settings
        self.clock = clock or Clock()
        self.boot_id = boot_id or uuid.uuid4().hex
        self.started_unix_s = self.clock.unix_s()
        self.changes = Changes()
        self.events = EventRing(self.boot_id, self.changes)
        self.accounts = Accounts(settings.tracked_adapters)
        self.metrics = Metrics(settings.label, self.accounts, self.clock)
        self.metrics.gauges = self.gauges
        self.draining = False
        self._serving: _Serving | None = None
        self._open: set[Generation] = set()
        self._places = 0
        """Sequences in the line or running."""
        self._requests = 0
        """Requests in the line or running, waiting for a load included."""
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._last_request_unix_s: float | None = None
        self._told: tuple[int, float, bytes] | None = None
        """(seq, when, JSON) of the last snapshot."""

    # --- life ---------------------------------------------------------------------------

    def serve(self, base: LoadedBase) -> None:
        """The engine runs: from now on requests are accepted."""
        limits = AdapterLimits(
            slots=self.settings.slots,
            max_rank=self.settings.max_rank,
            host_cache_bytes=self.settings.host_cache_bytes,
            host_idle_s=self.settings.host_idle_s,
            max_load_waiting=self.settings.max_load_waiting,
            max_adapters=self.settings.max_adapters,
            retry_base_s=self.settings.retry_base_s,
            retry_max_s=self.settings.retry_max_s,
            drain_adapter_s=self.settings.drain_adapter_s,
        )
        manager = AdapterManager(
            base.engine,
            base.store,
            limits,
            boot_id=self.boot_id,
            clock=self.clock,
            changes=self.changes,
            events=self.events,
            metrics=self.metrics,
            accounts=self.accounts,
        )
        self._serving = _Serving(base, manager, Mailbox(asyncio.get_running_loop()))
        self.changes.bump()

    @property
    def ready(self) -> bool:
        return self._serving is not None and not self.draining and self.healthy

    @property
    def healthy(self) -> bool:
        """False when the engine's thread has died: nothing here can serve again."""
        return self._serving is None or self._serving.base.engine.observe().healthy

    async def sweep_forever(self) -> None:
        """The one sweeper: idleness, host copies, pinned loads. Returns when the engine has died."""
        while True:
            await asyncio.sleep(self.settings.sweep_interval_s)
            if self._serving is not None:
                if not self.healthy:
                    return
                self._serving.adapters.sweep()

    async def drain(self, *, notice_s: float, grace_s: float) -> None:
        """Refuses new requests, lets running ones finish for `grace_s`, ends the rest."""
        self.draining = True
        self.changes.bump()
        await asyncio.sleep(notice_s)
        try:
            async with asyncio.timeout(max(0.0, grace_s - notice_s)):
                await self._quiet.wait()
        except TimeoutError:
            log.warning("ending %d requests that did not finish in time", self._requests)
            self._end_all("The replica is shutting down.")
            if self._serving is not None:
                await self._serving.adapters.close()

    async def close(self) -> None:
        """After draining: ends what is left and the loads under way. The engine is the caller's to stop."""
        self._end_all("The replica is shutting down.")
        if self._serving is not None:
            await self._serving.adapters.close()
        self.changes.close()

    def engine_died(self) -> None:
        """No output will come any more: every reader is told now."""
        for generation in list(self._open):
            generation.engine_died("The engine of this replica has died.")

    def _end_all(self, message: str) -> None:
        for generation in list(self._open):
            generation.abort(message)

    # --- adapters -----------------------------------------------------------------------

    @property
    def adapters(self) -> AdapterManager:
        """Raises Unavailable until the base is loaded."""
        return self._need_serving().adapters

    @property
    def codec(self) -> TextCodec:
        return self._need_serving().base.codec

    async def resolve(self, request: ResolveRequest) -> ResolveAnswer:
        return await self._need_serving().base.store.resolve(request)

    def _need_serving(self) -> _Serving:
        if self._serving is None:
            raise Unavailable("The base model is still loading.", code=CODE_STARTING, retry_after_s=5)
        return self._serving

    def target_of(self, header: str | None, model: str) -> AdapterKey | None:
        """The adapter a request is for, None for the base. Without a header the body's model decides, or 404."""
        if header == BASE_TARGET:
            return None
        if header is not None:
            try:
                return AdapterKey.parse(header)
            except ValueError as error:
                raise InvalidRequest(str(error), param=HEADER_ADAPTER) from error
        if model == self.settings.base_name:
            return None
        key = self._need_serving().adapters.key_of_name(model)
        if key is None:
            raise ModelNotFound(model)
        return key

    # --- requests -----------------------------------------------------------------------

    async def begin(self, request: ChatRequest | CompletionRequest, header: str | None) -> Running:
        """Accepts a request: prompt, bounds, place in the line, the adapter's slot, the engine. Raises ApiError.

        Cancelled while it waits, it gives everything back.
        """
        serving = self._need_serving()
        self._refuse_when_draining()
        target = self.target_of(header, request.model)
        codec, facts = serving.base.codec, serving.base.engine.facts
        prompts = await prompts_of(request, codec, facts)
        spec = grammar_of(request, codec)
        grammar = None if spec is None else await serving.base.grammars.compile(spec)
        sequences = sequences_of(request, prompts, grammar, codec, facts)
        echo: tuple[EchoedPrompt, ...] = ()
        if isinstance(request, CompletionRequest) and request.echo:
            echo = tuple([await codec.echo(prompt) for prompt in prompts])
        self._refuse_when_draining()
        self._enter(len(sequences))
        try:
            lease = None if target is None else await serving.adapters.acquire(target)
        except BaseException:
            self._leave(len(sequences))
            raise
        generation = self._generation(serving, request, sequences, lease)
        try:
            generation.start()  # from here on its end gives back the lease and the place
        except ValueError as error:
            raise InvalidRequest(str(error), param=request.prompt_param, code="context_length_exceeded") from error
        return Running(
            generation,
            sequences=len(sequences),
            echo=echo,
            target=BASE_TARGET if lease is None else f"{lease.display}@{lease.key.digest}",
            cold_start_s=None if lease is None else lease.cold_start_s,
            fingerprint=self._fingerprint(serving.base.digest, lease),
        )

    def _generation(
        self,
        serving: _Serving,
        request: ChatRequest | CompletionRequest,
        sequences: Sequence[SequenceMaker],
        lease: Lease | None,
    ) -> Generation:
        slot, salt = (BASE_SLOT, BASE_SALT) if lease is None else (lease.slot, lease.key.digest)
        begun_s = self.clock.now_s()

        def on_end(ended: Ended) -> None:
            self._open.discard(generation)
            self._leave(len(sequences))
            if lease is not None:
                lease.account.count(ended.outcome, ended.usage)
                lease.release()
            if ended.outcome is not Outcome.REFUSED:
                self.metrics.ended(ended.outcome, ended.usage, self.clock.now_s() - begun_s)

        generation = Generation(
            serving.base.engine,
            serving.mailbox,
            [make(slot, salt) for make in sequences],
            n=request.n,
            stops=request.stops,
            decode=serving.base.codec.decode,
            on_end=on_end,
            # who scores texts counts tokens (lm-eval leaves the last one out, whatever it is)
            tell_end_token=isinstance(request, CompletionRequest),
        )
        if lease is not None:
            lease.attach(generation)
        self._open.add(generation)
        return generation

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise Unavailable(
                "This replica is shutting down and accepts nothing new.", code=CODE_DRAINING, retry_after_s=1
            )

    def _enter(self, sequences: int) -> None:
        bound = self.settings.max_batch + self.settings.max_waiting
        if self._places + sequences > bound:
            raise TooManyRequests(
                f"{self._places} sequences are under way on this replica, {bound} is the most.",
                code=CODE_QUEUE_FULL,
                retry_after_s=2,
            )
        self._places += sequences
        self._requests += 1
        self._quiet.clear()
        self._note_request()

    def _leave(self, sequences: int) -> None:
        self._places -= sequences
        self._requests -= 1
        if self._requests == 0:
            self._quiet.set()
        self._note_request()

    def _note_request(self) -> None:
        self._last_request_unix_s = self.clock.unix_s()
        self.changes.bump_soon()

    def _fingerprint(self, base_digest: str | None, lease: Lease | None) -> str:
        """Changes with the weights and the version: what `seed` promises holds while it stays."""
        weights = BASE_SALT if lease is None else lease.key.digest
        text = f"{base_digest or self.settings.model} {weights} {_version()}"
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    # --- state --------------------------------------------------------------------------

    def snapshot(self) -> RuntimeSnapshot:
        serving, stats = self._serving, self._stats()
        return RuntimeSnapshot(
            seq=self.changes.seq,
            boot_id=self.boot_id,
            started_unix_s=self.started_unix_s,
            base=BaseReport(
                served_name=self.settings.base_name,
                digest=None if serving is None else serving.base.digest,
                max_model_len=self.settings.max_model_len or 0
                if serving is None
                else serving.base.engine.facts.max_model_len,
                dtype=self.settings.dtype if serving is None else serving.base.engine.facts.dtype,
            ),
            ready=self.ready,
            draining=self.draining,
            slots_total=self.settings.slots,
            slots_used=0 if serving is None else serving.adapters.slots_used,
            max_rank=self.settings.max_rank,
            device_bytes=stats.device_bytes,
            host_bytes=0 if serving is None else serving.adapters.host_bytes,
            in_flight=self._requests,
            waiting=stats.waiting + (0 if serving is None else serving.adapters.waiting),
            kv_usage=_kv_usage(stats),
            last_request_unix_s=self._last_request_unix_s,
            adapters=[] if serving is None else serving.adapters.reports(),
        )

    def snapshot_json(self) -> bytes:
        """The snapshot as sent; built once per change for all who wait for it."""
        now_s = self.clock.now_s()
        if self._told is None or self._told[0] != self.changes.seq or now_s - self._told[1] > SNAPSHOT_AGE_S:
            self._told = (self.changes.seq, now_s, self.snapshot().model_dump_json(by_alias=True).encode())
        return self._told[2]

    def gauges(self) -> Gauges:
        serving, stats = self._serving, self._stats()
        if serving is None:
            return Gauges(slots_total=self.settings.slots, draining=self.draining)
        running, waiting = serving.adapters.activity()
        return Gauges(
            running=stats.running,
            waiting=stats.waiting + serving.adapters.waiting,
            kv_usage=_kv_usage(stats),
            slots_total=self.settings.slots,
            slots_used=serving.adapters.slots_used,
            device_bytes=stats.device_bytes,
            host_bytes=serving.adapters.host_bytes,
            registered=serving.adapters.registered,
            steps=stats.steps,
            preemptions=stats.preemptions,
            prefix_queried_tokens=stats.prefix_queried_tokens,
            prefix_hit_tokens=stats.prefix_hit_tokens,
            ready=self.ready,
            draining=self.draining,
            running_adapters=running,
            waiting_adapters=waiting,
            decode_program=serving.base.engine.facts.decode_program,
        )

    def _stats(self) -> EngineStats:
        if self._serving is None:
            return EngineStats(0, 0, 0, 0, self.settings.slots, 0, 0, 0, True, 0)
        return self._serving.base.engine.observe()


def _kv_usage(stats: EngineStats) -> float:
    return min(1.0, stats.kv_blocks_used / stats.kv_blocks_total) if stats.kv_blocks_total else 0.0


@functools.cache  # it reads files, and every request asks
def _version() -> str:
    try:
        return version("lorapool")
    except PackageNotFoundError:
        return "unknown"
