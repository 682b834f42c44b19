"""The runtime without HTTP: admits parsed requests within bounds, drains them at the end, and reports its state.

It owns the open requests. Each waits for its adapter and for its turn, then holds its turn and its adapter's lease
until the engine has ended it. Requests are refused while starting or draining and when the queue is full, before
anything is accepted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorapool_api.base_modules import BaseModules
from lorapool_api.basemodel import PrefixSharing
from lorapool_api.common import BASE_TARGET, HEADER_ADAPTER, AdapterKey
from lorapool_api.openai import (
    CODE_DRAINING,
    CODE_STARTING,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from lorapool_api.protocol import (
    BaseChat,
    BaseReport,
    NamespaceCredentials,
    Preload,
    PreloadList,
    RemovedAdapter,
    ResolveAnswer,
    ResolveRequest,
    RuntimeSnapshot,
    Usage,
)
from lorapool_api.release import release
from lorapool_api.trust.mounted_files import Stamp, stamp_of
from lorapool_runtime.accounts.accounting import Accounting, Device
from lorapool_runtime.accounts.journal import JournalBounds
from lorapool_runtime.accounts.live_request import Asked
from lorapool_runtime.accounts.usage import Outcome, UsageTracker
from lorapool_runtime.adapters.disk_store import AdapterStore
from lorapool_runtime.adapters.entry import Lease
from lorapool_runtime.adapters.manager import AdapterManager
from lorapool_runtime.adapters.registry import AdapterLimits
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import BASE_SLOT, Engine, EngineStats
from lorapool_runtime.events import Changes, EventRing
from lorapool_runtime.metrics import Gauges, Metrics
from lorapool_runtime.openai.chats.chat_format import ChatFormat
from lorapool_runtime.openai.chats.chat_formats import NO_BASE_CHAT, ChatFormats
from lorapool_runtime.openai.chats.tokenizer import Tokenizer
from lorapool_runtime.openai.encoding import EncodedRequest, encode
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest
from lorapool_runtime.openai.tools.grammar import GrammarCompiler
from lorapool_runtime.serving.admission import Admission, Place
from lorapool_runtime.serving.caller import Caller
from lorapool_runtime.serving.generation import Generation, Mailbox, engine_requests
from lorapool_runtime.serving.tokens import BearerTokens
from lorapool_runtime.serving.turns import Turn, Turns
from lorapool_runtime.settings import RuntimeSettings
from lorapool_runtime.startup_progress import StartupProgress

log = logging.getLogger(__name__)

BASE_SALT = "base"
STARTUP_REPORT_S = 2.0
"""Time between two reports of the progress of the start."""
SNAPSHOT_AGE_S = 0.5
"""A cached snapshot is used for at most this long: some counts change without a new sequence number."""


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The base model, ready to serve."""

    engine: Engine
    tokenizer: Tokenizer
    formats: ChatFormats
    grammars: GrammarCompiler
    store: AdapterStore
    digest: str | None
    modules: BaseModules = field(default_factory=lambda: BaseModules(modules=[]))
    """What adapters may name in it."""


@dataclass(frozen=True, slots=True)
class _Serving:
    base: LoadedBase
    adapters: AdapterManager
    mailbox: Mailbox
    turns: Turns

    @property
    def waiting(self) -> int:
        """Requests that wait for a load or for their turn."""
        return self.adapters.waiting + self.turns.waiting(BASE_SALT)


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that the engine runs, with everything its response needs."""

    generation: Generation
    encoded: EncodedRequest
    sequences: int
    target: str
    """For the response header: `<namespace>/<name>@<digest>` or `base`."""
    cold_start_s: float | None
    fingerprint: str
    relaxed: tuple[str, ...] = ()
    """The keywords of its JSON schemas that are not enforced."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model that a request names: the base, or an adapter of it."""

    base: LoadedBase
    chat: ChatFormat
    target: str
    """As in `AdmittedRequest`."""


class Runtime:
    """Raises SettingsError when a file that the settings name cannot be read."""

    def __init__(self, settings: RuntimeSettings, *, clock: Clock | None = None, boot_id: str | None = None) -> None:
        self.settings = settings
        self.clock = clock or Clock()
        self.tokens = BearerTokens(settings, self.clock)
        self.startup = StartupProgress(self.clock.now_s)
        self.boot_id = boot_id or uuid.uuid4().hex
        self.started_unix_s = self.clock.unix_s()
        self.changes = Changes()
        self.usage = UsageTracker(settings.tracked_adapters)
        self.accounting = Accounting(
            settings.usage_dir,
            self.boot_id,
            self.usage,
            self.clock,
            rows=2 * (settings.max_batch + settings.max_waiting),
            bounds=JournalBounds(
                settings.usage_max_records, settings.usage_max_bytes, folds=settings.usage_dir is not None
            ),
        )
        self.events = EventRing(self.boot_id, self.changes, on_event=self.accounting.residency)
        self.metrics = Metrics(settings.label, self.usage, self.clock)
        self.metrics.gauges = self.gauges
        self.draining = False
        self._serving: _Serving | None = None
        self._preloading: asyncio.Task[None] | None = None
        self._accounting: asyncio.Task[None] | None = None
        self._open: set[Generation] = set()
        self._by_attempt: dict[str, Generation] = {}
        self._admission = Admission(settings.max_batch + settings.max_waiting, self._note_request)
        self._credentials: NamespaceCredentials | None = None
        self._ready_unix_s: float | None = None
        self._last_request_unix_s: float | None = None
        self._chat_stamp: Stamp | None = None
        """Of the file that says how the base is talked to, as it was read last."""
        self._cached_snapshots: tuple[int, float, dict[int, bytes]] = (0, 0.0, {})
        """(seq, monotonic time, JSON by the number of the reader's last snapshot)."""

    # --- life ---------------------------------------------------------------------------

    def serve(self, base: LoadedBase) -> None:
        """Accepts requests from now on, and is ready once the adapters to preload are loaded. The engine must run."""
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
            min_residency_s=self.settings.min_residency_s,
            slot_wait_s=self.settings.slot_wait_s,
        )
        if self._credentials is not None:
            base.store.give_credentials(self._credentials)
        turns = Turns(self.settings.max_batch)
        manager = AdapterManager(
            base.engine,
            base.store,
            base.formats,
            limits,
            boot_id=self.boot_id,
            clock=self.clock,
            changes=self.changes,
            events=self.events,
            metrics=self.metrics,
            usage=self.usage,
            on_drain=lambda key: turns.recall(str(key)),
        )
        mailbox = Mailbox(asyncio.get_running_loop())
        base.engine.report_steps(mailbox.sink(lambda step: self.accounting.step(*step)))
        self._serving = _Serving(base, manager, mailbox, turns)
        self._open_accounts(base.engine)
        if wanted := read_preloads(self.settings.preload_file):
            self._preloading = asyncio.create_task(self._preload(manager, wanted), name="preload")
        else:
            self._accept()

    def _open_accounts(self, engine: Engine) -> None:
        facts = engine.facts
        device_bytes = engine.observe().device_bytes + (0 if facts.slots_reserved else facts.slot_bytes)
        self.accounting.open(Device(facts.device, self.settings.slots, facts.slot_bytes, device_bytes))
        self._accounting = asyncio.create_task(self.accounting.run(), name="accounting")

    async def _preload(self, adapters: AdapterManager, wanted: list[Preload]) -> None:
        try:
            loaded = await adapters.preload(wanted[: self.settings.slots], self.settings.preload_timeout_s)
            log.info("adapters preloaded", extra={"loaded": loaded, "wanted": len(wanted)})
        finally:
            self._preloading = None
            self._accept()

    def _accept(self) -> None:
        self._ready_unix_s = self.clock.unix_s()
        self.changes.bump()

    @property
    def ready(self) -> bool:
        return self._serving is not None and self._preloading is None and not self.draining and self.healthy

    @property
    def healthy(self) -> bool:
        """False when the engine's thread has died: the process can no longer serve and should end."""
        return self._serving is None or self._serving.base.engine.observe().healthy

    async def sweep_forever(self) -> None:
        """Unloads idle adapters, drops idle host copies and loads pinned adapters. Returns when the engine has died."""
        while True:
            await asyncio.sleep(self.settings.sweep_interval_s)
            if self._serving is not None:
                if not self.healthy:
                    return
                self._serving.adapters.sweep()
                await self._renew_base_chat(self._serving)

    async def _renew_base_chat(self, serving: _Serving) -> None:
        """Applies what the BaseModel says about chats, if its file has changed."""
        file = self.settings.chat_file
        stamp = None if file is None else stamp_of(file)
        if stamp == self._chat_stamp:
            return
        self._chat_stamp = stamp
        formats, said = serving.base.formats, read_base_chat(file)
        if said == formats.said:
            return
        await asyncio.to_thread(formats.use_base, said)
        await serving.adapters.renew_chats()
        self.changes.bump()

    async def report_startup(self) -> None:
        """Lets long-polls see the progress of the start. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(STARTUP_REPORT_S)
            self.changes.bump()

    async def drain(self, *, notice_s: float, grace_s: float) -> None:
        """Refuses new requests, lets running ones finish for `grace_s`, then ends the rest."""
        self.draining = True
        self.changes.bump()
        await asyncio.sleep(notice_s)
        try:
            async with asyncio.timeout(max(0.0, grace_s - notice_s)):
                await self._admission.quiet.wait()
        except TimeoutError:
            log.warning("ending %d requests that did not finish in time", self._admission.requests)
            self._end_all("The replica is shutting down.")
            if self._serving is not None:
                await self._serving.adapters.close()

    async def close(self) -> None:
        """Ends the remaining requests and loads. Does not stop the engine."""
        self._end_all("The replica is shutting down.")
        if self._preloading is not None:
            self._preloading.cancel()
        if self._serving is not None:
            await self._serving.adapters.close()
        self.changes.close()

    async def close_accounts(self) -> None:
        """Writes the last records of usage. To be called when the engine has stopped."""
        if self._accounting is not None:
            self._accounting.cancel()
        await self.accounting.close()

    def engine_died(self) -> None:
        """Ends every open request with an error: the engine will deliver no further output."""
        for generation in list(self._open):
            generation.engine_died("The engine of this replica has died.")

    def _end_all(self, message: str) -> None:
        for generation in list(self._open):
            generation.abort(message)
        if self._serving is not None:
            self._serving.turns.close()

    # --- adapters -----------------------------------------------------------------------

    @property
    def adapters(self) -> AdapterManager:
        """Raises UnavailableError until the base is loaded."""
        return self._need_serving().adapters

    @property
    def base_modules(self) -> BaseModules:
        """Raises UnavailableError until the base is loaded."""
        return self._need_serving().base.modules

    async def resolve(self, request: ResolveRequest) -> ResolveAnswer:
        return await self._need_serving().base.store.resolve(request)

    def give_credentials(self, credentials: NamespaceCredentials) -> None:
        """Replaces the namespaces' own credentials. Those that arrive before the base is loaded are kept for it."""
        self._credentials = credentials
        if self._serving is not None:
            self._serving.base.store.give_credentials(credentials)

    def _need_serving(self) -> _Serving:
        if self._serving is None:
            raise UnavailableError("The base model is still loading.", code=CODE_STARTING, retry_after_s=5)
        return self._serving

    def target_of(self, header: str | None, model: str) -> AdapterKey | None:
        """The adapter a request is for, None for the base. Without the header the body's model decides.

        Raises InvalidRequestError for a malformed header, ModelNotFoundError for an unknown model.
        """
        if header == BASE_TARGET:
            return None
        if header is not None:
            try:
                return AdapterKey.parse(header)
            except ValueError as error:
                raise InvalidRequestError(str(error), param=HEADER_ADAPTER) from error
        if model == self.settings.base_name:
            return None
        key = self._need_serving().adapters.key_of_name(model)
        if key is None:
            raise ModelNotFoundError(model)
        return key

    # --- requests -----------------------------------------------------------------------

    @asynccontextmanager
    async def named_model(self, model: str, header: str | None, caller: Caller) -> AsyncIterator[NamedModel]:
        """The model that a request names, for one that generates nothing; it counts as a request while inside.

        Waits for the load of an adapter whose files were not read yet. Raises ApiError.
        """
        serving = self._need_serving()
        self._refuse_when_draining()
        target = self.target_of(header, model)
        place = Place(caller.tenant, BASE_SALT if target is None else str(target), 1)
        self._admission.enter(place)
        try:
            async with self._admission.waiting(place):
                chat = serving.base.formats.base if target is None else (await self._chat_of(serving, target))[1]
                name = BASE_TARGET if target is None else f"{serving.adapters.display_of(target)}@{target.digest}"
                yield NamedModel(serving.base, chat, name)
        finally:
            self._admission.leave(place)

    async def admit(
        self, request: ChatRequest | CompletionRequest, header: str | None, caller: Caller
    ) -> AdmittedRequest:
        """Encodes the request, takes its queue slots and its adapter's lease, and submits it. Raises ApiError.

        Cancelling it releases everything that it has taken.
        """
        serving = self._need_serving()
        base = serving.base
        self._refuse_when_draining()
        target = self.target_of(header, request.model)
        chat = base.formats.base if target is None else serving.adapters.chat_of(target)
        encoded = None if chat is None else await self._encoded(serving, request, chat, caller.tenant)
        self._refuse_when_draining()
        place = Place(caller.tenant, BASE_SALT if target is None else str(target), request.sequences)
        self._admission.enter(place)
        try:
            async with self._admission.waiting(place):
                waited_s: float | None = None
                if target is not None and encoded is None:  # its files say how the request is written
                    waited_s, chat = await self._chat_of(serving, target)
                    encoded = await self._encoded(serving, request, chat, caller.tenant)
                assert encoded is not None
                turn, lease = await self._turn_and_lease(serving, target, encoded, caller.tenant, waited_s)
        except BaseException:
            self._admission.leave(place)
            raise
        return AdmittedRequest(
            self._submit(serving, request, encoded, turn, lease, caller, place),
            encoded,
            sequences=request.sequences,
            target=BASE_TARGET if lease is None else f"{lease.display}@{lease.key.digest}",
            cold_start_s=None if lease is None else lease.cold_start_s,
            fingerprint=self._fingerprint(base.digest, lease),
            relaxed=() if encoded.grammar is None else tuple(map(request.own_param, encoded.grammar.relaxed)),
        )

    @staticmethod
    async def _encoded(
        serving: _Serving, request: ChatRequest | CompletionRequest, chat: ChatFormat, tenant: str
    ) -> EncodedRequest:
        base = serving.base
        return await encode(request, base.tokenizer, chat, base.grammars, base.engine.facts, tenant)

    @staticmethod
    async def _chat_of(serving: _Serving, target: AdapterKey) -> tuple[float, ChatFormat]:
        """The chat format of an adapter that is not loaded yet, and how long its load was waited for."""
        waited_s = 0.0
        while (chat := serving.adapters.chat_of(target)) is None:
            waited_s += await serving.adapters.loaded(target, has_waited=waited_s > 0) or 0.0
        return waited_s, chat

    async def _turn_and_lease(
        self,
        serving: _Serving,
        target: AdapterKey | None,
        encoded: EncodedRequest,
        tenant: str,
        cold_start_s: float | None,
    ) -> tuple[Turn, Lease | None]:
        """Waits until the adapter is loaded and it is this request's turn; again when the adapter leaves meanwhile.

        `cold_start_s`: how long it has waited for the load already; None if it has not.
        """
        sequences, tokens = len(encoded.sampling), sum(map(len, encoded.prompts))
        if target is None:
            turn = await serving.turns.take(BASE_SALT, tenant=tenant, sequences=sequences, tokens=tokens)
            assert turn is not None  # the base is never recalled
            return turn, None
        has_waited = cold_start_s is not None
        while True:
            waited_s = await serving.adapters.loaded(target, has_waited=has_waited)
            cold_start_s = waited_s if cold_start_s is None else cold_start_s + (waited_s or 0.0)
            has_waited = True
            with serving.adapters.waiting_request(target):
                turn = await serving.turns.take(str(target), tenant=tenant, sequences=sequences, tokens=tokens)
            if turn is None:
                continue
            try:
                lease = serving.adapters.lease(target, cold_start_s)
            except BaseException:
                turn.end()
                raise
            if lease is not None:
                return turn, lease
            turn.end()

    def _submit(
        self,
        serving: _Serving,
        request: ChatRequest | CompletionRequest,
        encoded: EncodedRequest,
        turn: Turn,
        lease: Lease | None,
        caller: Caller,
        place: Place,
    ) -> Generation:
        slot, salt = (BASE_SLOT, BASE_SALT) if lease is None else (lease.slot, lease.key.digest)
        scope = caller.tenant if self.settings.prefix_sharing is PrefixSharing.TENANT else ""
        begun_s = self.clock.now_s()
        account = self.usage.base if lease is None else lease.usage
        requests = engine_requests(request, encoded, slot=slot, cache_salt=salt, cache_scope=scope)
        live = self.accounting.begin(_asked(caller, lease), account, [one.request_id for one in requests], request.n)

        def on_end(outcome: Outcome, usage: Usage) -> None:
            self._open.discard(generation)
            if self._by_attempt.get(caller.attempt) is generation:
                del self._by_attempt[caller.attempt]
            self._admission.leave(place)
            turn.end()
            account.end(generation.usage, outcome, live.gpu_ns)
            if lease is not None:
                lease.release()
            if outcome is Outcome.REFUSED:
                self.accounting.discard(live)
            else:
                self.accounting.end(live, outcome, usage)
                self.metrics.ended(outcome, usage, self.clock.now_s() - begun_s)

        generation = Generation(
            serving.base.engine,
            serving.mailbox,
            requests,
            n=request.n,
            live=live,
            stops=encoded.stops,
            decode=encoded.decoder,
            on_token=turn.charge,
            on_end=on_end,
            # evaluation harnesses count tokens (lm-eval drops the last one, whatever it is)
            score_end_token=isinstance(request, CompletionRequest),
            report_steps=caller.wants_usage and (request.stream or caller.wants_events),
        )
        if lease is not None:
            lease.attach(generation)
        self._open.add(generation)
        try:
            generation.start()  # from here on `on_end` releases the lease and the queue slots
        except ValueError as error:
            raise InvalidRequestError(str(error), param=request.prompt_param, code="context_length_exceeded") from error
        self._by_attempt[caller.attempt] = generation
        account.begin(generation.usage)
        return generation

    async def cancel(self, attempt: str) -> Usage | None:
        """Ends an attempt, if it has not ended; returns its final usage, None for an attempt that is not known."""
        generation = self._by_attempt.get(attempt)
        if generation is None:
            return self.accounting.usage_of(attempt)
        generation.cancel()
        await generation.ended.wait()
        return generation.usage()

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise UnavailableError(
                "This replica is shutting down and accepts nothing new.", code=CODE_DRAINING, retry_after_s=1
            )

    def _note_request(self) -> None:
        self._last_request_unix_s = self.clock.unix_s()
        self.changes.bump_soon()

    def _fingerprint(self, base_digest: str | None, lease: Lease | None) -> str:
        """Identifies the weights and the version: `seed` is reproducible only while it stays the same."""
        weights = BASE_SALT if lease is None else lease.key.digest
        text = f"{base_digest or self.settings.model} {weights} {release()}"
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    # --- state --------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together; 0 while it is not known."""
        if self._serving is None:
            return self.settings.max_model_len or 0
        return self._serving.base.engine.facts.max_model_len

    def snapshot(self, after: int = 0) -> RuntimeSnapshot:
        """The present state. It leaves out the adapters that are unchanged since the snapshot numbered `after`."""
        serving, stats = self._serving, self._stats()
        delta = None if serving is None or after == 0 else serving.adapters.reports_since(after)
        reports = delta[0] if delta is not None else [] if serving is None else serving.adapters.reports()
        return RuntimeSnapshot(
            seq=self.changes.seq,
            boot_id=self.boot_id,
            started_unix_s=self.started_unix_s,
            ready_unix_s=self._ready_unix_s,
            now_unix_s=self.clock.unix_s(),
            base=BaseReport(
                served_name=self.settings.base_name,
                digest=None if serving is None else serving.base.digest,
                max_model_len=self.max_model_len,
                dtype=self.settings.dtype if serving is None else serving.base.engine.facts.dtype,
                chat=None if serving is None else serving.base.formats.base.report,
            ),
            ready=self.ready,
            draining=self.draining,
            slots_total=self.settings.slots,
            slots_used=0 if serving is None else serving.adapters.slots_used,
            max_rank=self.settings.max_rank,
            device_bytes=stats.device_bytes,
            host_bytes=0 if serving is None else serving.adapters.host_bytes,
            in_flight=self._admission.requests,
            waiting=stats.waiting + (0 if serving is None else serving.waiting),
            kv_usage=_kv_usage(stats),
            last_request_unix_s=self._last_request_unix_s,
            startup=self.startup.report() if serving is None else None,
            full=delta is None,
            adapters=reports,
            removed=[] if delta is None else [RemovedAdapter(uid=uid, digest=digest) for uid, digest in delta[1]],
        )

    async def poll_snapshot(self, after: int, boot_id: str, wait_s: float) -> bytes:
        """The snapshot as JSON, once there is one above `after` or `wait_s` have passed.

        A reader of this very process gets the changes since `after`, any other one all adapters.
        """
        same_process = boot_id == self.boot_id
        if same_process or not boot_id:
            await self.changes.wait(after, wait_s)
        return self._snapshot_json(after if same_process else 0)

    def _snapshot_json(self, after: int) -> bytes:
        """The snapshot as JSON, built once per change for all long-polls with the same `after`."""
        now_s = self.clock.now_s()
        seq, made_s, cached = self._cached_snapshots
        if seq != self.changes.seq or now_s - made_s > SNAPSHOT_AGE_S:
            cached = {}
            self._cached_snapshots = (self.changes.seq, now_s, cached)
        if after not in cached:
            cached[after] = self.snapshot(after).model_dump_json(by_alias=True).encode()
        return cached[after]

    def gauges(self) -> Gauges:
        serving, stats = self._serving, self._stats()
        if serving is None:
            return Gauges(
                slots_total=self.settings.slots, draining=self.draining, journal=self.accounting.journal.stats
            )
        running, waiting = serving.adapters.activity()
        return Gauges(
            running=stats.running,
            waiting=stats.waiting + serving.waiting,
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
            journal=self.accounting.journal.stats,
        )

    def _stats(self) -> EngineStats:
        if self._serving is None:
            return EngineStats(0, 0, 0, 0, self.settings.slots, 0, 0, 0, True, 0)
        return self._serving.base.engine.observe()


def _asked(caller: Caller, lease: Lease | None) -> Asked:
    return Asked(
        attempt=caller.attempt,
        request_id=caller.request_id,
        key_uid=caller.key_uid,
        project=caller.project,
        digest="" if lease is None else lease.key.digest,
        model="" if lease is None else lease.display,
    )


def read_base_chat(file: Path | None) -> BaseChat:
    """What the BaseModel says about chats; nothing if the file is missing or malformed."""
    if file is None or not file.is_file():
        return NO_BASE_CHAT
    try:
        return BaseChat.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        log.warning("spec.chatTemplate is not used: %s cannot be read", file, extra={"error": str(error)[:300]})
        return NO_BASE_CHAT


def read_preloads(file: Path | None) -> list[Preload]:
    """The adapters to load before the runtime is ready; none if the file is missing or malformed."""
    if file is None or not file.is_file():
        return []
    try:
        return PreloadList.model_validate_json(file.read_bytes()).adapters
    except (OSError, ValueError) as error:
        log.warning("no adapter is preloaded: %s cannot be read", file, extra={"error": str(error)[:300]})
        return []


def _kv_usage(stats: EngineStats) -> float:
    return min(1.0, stats.kv_blocks_used / stats.kv_blocks_total) if stats.kv_blocks_total else 0.0
