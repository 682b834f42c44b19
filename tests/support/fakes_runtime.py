"""Fakes for the runtime's serving side: a scripted engine, a store of invented folders, a byte tokenizer.

`FakeEngine` implements the `Engine` protocol with a real thread and records violations by its caller (such as a load
into a slot in use). `serving` runs the real server over a real socket.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import functools
import hashlib
import queue
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.protocol import (
    AdapterDescriptor,
    ErrorDetail,
    NamespaceCredentials,
    ResolveAnswer,
    ResolveRequest,
    SourceRef,
    Tier,
)
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.adapters.disk_store import StoredAdapter
from lorapool_runtime.adapters.entry import Lease
from lorapool_runtime.adapters.manager import AdapterManager
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import (
    BASE_SLOT,
    EngineStats,
    FinishReason,
    GenerationRequest,
    HostAdapter,
    LoadOutcome,
    ModelFacts,
    StepSink,
    TokenLogprob,
    TokenOutput,
    TokenSink,
)
from lorapool_runtime.openai.chats.chat_format import ChatFormat
from lorapool_runtime.openai.chats.chat_formats import ChatFormats
from lorapool_runtime.openai.chats.template_process import TemplateProcesses
from lorapool_runtime.openai.chats.tokenizer import Tokenizer as BaseTokenizer
from lorapool_runtime.openai.tools.grammar import GrammarCompiler
from lorapool_runtime.serving.server import make_app
from lorapool_runtime.serving.service import LoadedBase, Runtime
from lorapool_runtime.settings import RuntimeSettings

EOS = 257
VOCAB = 259
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'refuse me' %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_characters() -> list[str]:
    """The 256 characters of byte-level tokenizers; the index is the byte, so token id = byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {byte: chr(byte) for byte in printable}, 0
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + extra)
            extra += 1
    return [table[byte] for byte in range(256)]


def save_byte_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A tokenizer folder in which every byte is one token, plus <|im_start|> 256, <|im_end|> 257, <|pad|> 258."""
    inner = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(byte_characters())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat_template
    fast.save_pretrained(str(folder))
    return folder


# --- the engine ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeHostAdapter:
    tag: str
    rank: int = 8
    host_bytes: int = 1000
    target_modules: tuple[str, ...] = ("q_proj",)


@dataclass
class _Run:
    request: GenerationRequest
    sink: TokenSink
    script: list[int]
    made: int = 0
    cancelled: bool = False


Reply = Callable[[str, str, GenerationRequest], str | bytes | list[int]]
"""(tag of the slot's adapter or "base", prompt text, request) → the text or tokens to generate."""


def say_who_i_am(tag: str, _prompt: str, _request: GenerationRequest) -> str:
    return f"I am {tag}."


@dataclass
class FakeEngine:
    reply: Reply = say_who_i_am
    step_s: float = 0.0005
    load_s: float = 0.0
    read_s: float = 0.0
    max_batch: int = 32
    slots: int = 4
    max_model_len: int = 512
    healthy: bool = True
    host_tier: bool = True
    read_errors: dict[str, ArtifactError] = field(default_factory=dict)
    load_error: Exception | None = None
    fail_after: int | None = None
    """Sequences end with an engine error after this many tokens."""
    violations: list[str] = field(default_factory=list)
    loads: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    unloads: int = 0
    tokens_made: int = 0
    made_by_request: Counter[str] = field(default_factory=Counter)
    requests: list[GenerationRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._in_slot: dict[int, str] = {}
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._runs: dict[str, _Run] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(
            self.max_model_len, VOCAB, "float32", frozenset({EOS}), (), 1,
            slots_reserved=not self.host_tier, host_tier=self.host_tier,
        )  # fmt: skip

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopped.set()
        self._thread.join(timeout_s)

    def read_adapter(self, folder: str, *, max_rank: int) -> HostAdapter:
        self.reads[folder] += 1
        time.sleep(self.read_s)
        if folder in self.read_errors:
            raise self.read_errors[folder]
        return FakeHostAdapter(Path(folder).name)

    def load(self, slot: int, adapter: HostAdapter) -> Future[LoadOutcome]:
        future: Future[LoadOutcome] = Future()
        assert isinstance(adapter, FakeHostAdapter)

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if any(run.request.slot == slot for run in self._runs.values()):
                self.violations.append(f"load into slot {slot} in use")
            time.sleep(self.load_s)
            if self.load_error is not None:
                future.set_exception(self.load_error)
                return
            self._in_slot[slot] = adapter.tag
            self.loads[adapter.tag] += 1
            future.set_result(LoadOutcome(slot, 2000, self.load_s))

        self._commands.put(do)
        return future

    def unload(self, slot: int) -> Future[int]:
        future: Future[int] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if any(run.request.slot == slot for run in self._runs.values()):
                self.violations.append(f"unload of slot {slot} in use")
            self._in_slot.pop(slot, None)
            self.unloads += 1
            future.set_result(2000)

        self._commands.put(do)
        return future

    def submit(self, request: GenerationRequest, sink: TokenSink) -> None:
        if len(request.prompt_ids) + request.sampling.max_tokens > self.max_model_len:
            raise ValueError("the request can never fit")
        self.requests.append(request)

        def do() -> None:
            tag = "base" if request.slot == BASE_SLOT else self._in_slot.get(request.slot, "nothing")
            if request.slot != BASE_SLOT and request.cache_salt == "base":
                self.violations.append("an adapter's request with the base's salt")
            prompt = bytes(token for token in request.prompt_ids if token < 256).decode(errors="replace")
            said = self.reply(tag, prompt, request)
            said = said.encode() if isinstance(said, str) else said
            script = list(said)
            if not request.sampling.ignore_eos:
                script.append(EOS)
            self._runs[request.request_id] = _Run(request, sink, script)

        self._commands.put(do)

    def cancel(self, request_id: str) -> None:
        def do() -> None:
            run = self._runs.pop(request_id, None)
            if run is not None:
                run.sink(self._end(run, FinishReason.CANCELLED))

        self._commands.put(do)

    def report_steps(self, sink: StepSink) -> None:
        self.step_sink = sink

    def observe(self) -> EngineStats:
        running = min(len(self._runs), self.max_batch)
        waiting = len(self._runs) - running
        return EngineStats(running, waiting, 100, running, self.slots, 1, 0, self.tokens_made, self.healthy, 5000)

    # --- the thread -----------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Empty):
                while True:
                    self._commands.get_nowait()()
            for run in list(self._runs.values())[: self.max_batch]:
                self._token(run)
            time.sleep(self.step_s)

    def _token(self, run: _Run) -> None:
        request, sampling = run.request, run.request.sampling
        if self.fail_after is not None and run.made >= self.fail_after:
            del self._runs[request.request_id]
            run.sink(self._end(run, FinishReason.ERROR, "the device is on fire"))
            return
        scores = None
        if request.prompt_logprobs is not None and not run.made:
            top = tuple((candidate, -0.5 - candidate) for candidate in range(request.prompt_logprobs))
            scores = tuple(TokenLogprob(token, -0.125, top) for token in request.prompt_ids[1:])
        if sampling.max_tokens == 0:
            del self._runs[request.request_id]
            run.sink(dataclasses.replace(self._end(run, FinishReason.LENGTH), prompt_logprobs=scores))
            return
        token = run.script[run.made % len(run.script)]
        run.made += 1
        self.tokens_made += 1
        self.made_by_request[request.request_id] += 1
        at_end = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        finish = None
        if at_end:
            finish = FinishReason.STOP
        elif run.made >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        logprob = None
        if sampling.top_logprobs is not None:
            top = tuple((candidate, -0.5 - candidate) for candidate in range(sampling.top_logprobs))
            logprob = TokenLogprob(token, -0.25, top)
        if finish is not None:
            del self._runs[request.request_id]
        run.sink(
            TokenOutput(
                request.request_id, token, not at_end, len(request.prompt_ids), run.made,
                finish_reason=finish, logprob=logprob, prompt_logprobs=scores,
            )
        )  # fmt: skip

    def _end(self, run: _Run, reason: FinishReason, error: str | None = None) -> TokenOutput:
        return TokenOutput(
            run.request.request_id, None, False, len(run.request.prompt_ids), run.made,
            finish_reason=reason, error=error,
        )  # fmt: skip


# --- the store ----------------------------------------------------------------------------


@dataclass
class FakeStore:
    """Sources by URI, with the duration and result of a fetch. The folder's name becomes the tag in the answers."""

    delay_s: float = 0.0
    errors: dict[str, list[ArtifactError]] = field(default_factory=dict)
    """Per URI, the errors of the next fetches, one each; when empty, fetches succeed."""
    digests: dict[str, str] = field(default_factory=dict)
    """Per URI, the digest of a source that holds another one than requested."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Per URI, the folder with files that are really there; others are invented."""
    fetches: Counter[str] = field(default_factory=Counter)
    disk: set[str] = field(default_factory=set)
    credentials: NamespaceCredentials = field(default_factory=NamespaceCredentials)
    pins: Counter[str] = field(default_factory=Counter)
    """By digest, how often its folder is pinned now."""

    async def fetch(self, digest: str, source: SourceRef, max_bytes: int | None, *, namespace: str) -> StoredAdapter:
        self.fetches[source.uri] += 1
        await asyncio.sleep(self.delay_s)
        if self.errors.get(source.uri):
            raise self.errors[source.uri].pop(0)
        tier = Tier.DISK if digest in self.disk else Tier.SOURCE
        self.disk.add(digest)
        tag = source.uri.rpartition("/")[2]
        return StoredAdapter(
            self.folders.get(source.uri, Path("/fake") / tag), self.digests.get(source.uri, digest), tier
        )

    @contextlib.contextmanager
    def pinned(self, digest: str) -> Iterator[None]:
        self.pins[digest] += 1
        yield
        self.pins[digest] -= 1

    def on_disk(self, digest: str) -> bool:
        return digest in self.disk

    def give_credentials(self, credentials: NamespaceCredentials) -> None:
        self.credentials = credentials

    async def resolve(self, request: ResolveRequest) -> ResolveAnswer:
        if self.errors.get(request.source.uri):
            error = self.errors[request.source.uri][0]
            return ResolveAnswer(failure=ErrorDetail(reason=error.reason.value, message=error.message))
        return ResolveAnswer(digest=digest_of_name("resolved"), rank=8, target_modules=["q_proj"], size_bytes=10)


def source_error(reason: FailureReason, message: str = "the source says no") -> ArtifactError:
    return ArtifactError(reason, message)


# --- names, descriptors, time ---------------------------------------------------------------


def digest_of_name(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def key_of(name: str, version: str = "1") -> AdapterKey:
    return AdapterKey(f"uid-{name}", digest_of_name(f"{name}-{version}"))


def descriptor(name: str, **changes: Any) -> AdapterDescriptor:
    values: dict[str, Any] = {
        "display": f"team/{name}",
        "names": [name],
        "source": SourceRef(uri=f"s3://bucket/{name}"),
        "idle_after_s": 300.0,
    }
    return AdapterDescriptor(**{**values, **changes})


@dataclass
class FakeClock:
    """A clock that moves only by `pass_s`."""

    now: float = 1000.0

    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: 1_700_000_000.0 + self.now)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


# --- a server -------------------------------------------------------------------------------


@dataclass
class Served:
    url: str
    runtime: Runtime
    engine: FakeEngine
    store: FakeStore


def settings_for_tests(**changes: Any) -> RuntimeSettings:
    values: dict[str, Any] = {
        "model": "/models/tiny",
        "served_name": "tiny",
        "listen_port": 0,
        "slots": 4,
        "drain_notice_s": 0.0,
        "sweep_interval_s": 0.02,
        "retry_base_s": 5.0,
        "min_residency_s": 0.0,
    }
    return RuntimeSettings(**{**values, **changes})


@functools.cache
def template_processes() -> TemplateProcesses:
    """Shared by all tokenizers of this process; they end with it."""
    made = TemplateProcesses(2, 4.0)
    atexit.register(made.close)
    return made


@functools.cache
def tokenizer_of(folder: Path) -> BaseTokenizer:
    """Loaded once per folder, which takes a quarter of a second. It keeps no state."""
    return BaseTokenizer(folder, threads=2, timeout_s=5.0, processes=template_processes())


def formats_of(folder: Path) -> ChatFormats:
    return ChatFormats(tokenizer_of(folder), rows=VOCAB, eos_ids={EOS})


def chat_of(folder: Path) -> ChatFormat:
    """The format of the base's own template."""
    return formats_of(folder).base


async def acquire(manager: AdapterManager, key: AdapterKey) -> Lease:
    """A lease on the adapter's slot, once it is loaded."""
    while True:
        waited_s = await manager.loaded(key)
        if (lease := manager.lease(key, waited_s)) is not None:
            return lease


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for has no event of its own
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def listening(
    runtime: Runtime, make: Callable[[Runtime], web.Application] = make_app, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serves `runtime` on a free port of loopback; yields its URL."""
    runner = web.AppRunner(
        make(runtime), access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=0.5
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def serving(
    tokenizer_folder: Path,
    *,
    engine: FakeEngine | None = None,
    store: FakeStore | None = None,
    clock: Clock | None = None,
    sweep: bool = False,
    tls: ssl.SSLContext | None = None,
    runtime: Runtime | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """A whole runtime with a fake engine and store, over a real socket. `runtime`: one that has not loaded its base."""
    runtime = runtime or Runtime(settings_for_tests(**settings), clock=clock)
    engine, store = engine or FakeEngine(), store or FakeStore()
    engine.start()
    tokenizer = tokenizer_of(tokenizer_folder)
    grammars = GrammarCompiler(tokenizer.grammar_json(), vocab_size=VOCAB, eos_token_ids={EOS}, timeout_s=5.0)
    runtime.serve(LoadedBase(engine, tokenizer, formats_of(tokenizer_folder), grammars, store, digest_of_name("base")))
    sweeping = asyncio.create_task(runtime.sweep_forever()) if sweep else None
    try:
        async with listening(runtime, tls=tls) as url:
            yield Served(url, runtime, engine, store)
    finally:
        if sweeping is not None:
            sweeping.cancel()
        await runtime.close()
        engine.stop(5.0)
        grammars.close()
    assert engine.violations == []
