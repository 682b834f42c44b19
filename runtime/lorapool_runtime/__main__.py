"""`python -m lorapool_runtime --model DIR|URI`: one base, many adapters, on this machine.

A worker of a group answers nothing: it computes for its leader, and ends with it.

HTTP answers at once (/healthz, /metrics); /readyz answers 200 when the base is loaded. SIGTERM: readiness off, running
requests finish within the grace period, then exit 0. Exit 1 when the base cannot be served or the engine dies; 2 for
invalid settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from aiohttp import web

from lorapool_api.liveness import Heartbeat, in_own_thread
from lorapool_api.logs import set_up_logs
from lorapool_api.settings import SettingsError
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_api.trust.tls import ServerCertificate
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.cgroup import wait_passively
from lorapool_runtime.engines.choose import EngineFactory, import_framework, make_engine, make_node
from lorapool_runtime.engines.errors import EngineStartError
from lorapool_runtime.openai.chats.tokenizer import TokenizerError
from lorapool_runtime.serving.probes import probes
from lorapool_runtime.serving.server import make_app
from lorapool_runtime.serving.service import LoadedBase, Runtime
from lorapool_runtime.settings import RuntimeSettings, read_settings
from lorapool_runtime.startup import BaseError, base_folder, bring_up, reason_of
from lorapool_runtime.startup_progress import StartupProgress

log = logging.getLogger("lorapool_runtime")

T = TypeVar("T")

ENGINE_STOP_S = 5.0
"""The engine finishes the step in progress; a step takes tens of milliseconds."""
LAST_ARRIVALS_S = 0.25
"""Between closing the listening sockets and closing the connections. Requests that have arrived are still refused in
words, which a gateway takes elsewhere; a connection that is cut may have begun its request."""
HEADER_MAX_BYTES = 16 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal to stop; returns the process's exit code."""
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, os.environ)
        set_up_logs("runtime", settings.log_level, settings.log_format)
        _export(settings)
        if settings.works_for_a_leader:
            code, clean = work_for_leader(settings), False
        else:
            code, clean = asyncio.run(run(settings, make_engine))
    except SettingsError as error:
        error.report("lorapool-runtime")
        return 2
    if not clean:  # a thread still loads the base, or computes it, and cannot be interrupted
        sys.stderr.flush()
        os._exit(code)
    return code


def _export(settings: RuntimeSettings) -> None:
    """Sets the variables that torch and the native kernels read when they are imported, which is later."""
    wait_passively()
    os.environ["LORAPOOL_NATIVE"] = settings.native


async def run(settings: RuntimeSettings, engine_factory: EngineFactory) -> tuple[int, bool]:
    """Serves until the end. Returns (exit code, whether every thread of ours has ended)."""
    runtime = Runtime(settings)
    stop = _stop_on_signals()
    async with _listening(runtime):
        loading = _in_thread(lambda: _bring_up(settings, engine_factory, runtime.startup))
        reporting = asyncio.create_task(runtime.report_startup())
        stopping = asyncio.create_task(stop.wait())
        loaded = asyncio.wrap_future(loading)
        either: list[asyncio.Future[Any]] = [loaded, stopping]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        reporting.cancel()
        if not loaded.done():
            return 0, False
        if (error := loaded.exception()) is not None:
            stopping.cancel()
            _log_refusal(error)
            return 1, False  # a library's thread may still wait for what has failed
        return await _serve(runtime, loaded.result(), stopping), True


def work_for_leader(settings: RuntimeSettings) -> int:
    """Computes a node's part of the base until the group ends; returns the exit code."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ended: Future[None] = _in_thread(lambda: _work(settings, stop))
    while not ended.done():
        with contextlib.suppress(TimeoutError):
            ended.exception(1.0)  # a signal's handler runs in between
    if (error := ended.exception()) is not None:
        _log_refusal(error)
        return 1
    log.info("stopped")
    return 0


def _work(settings: RuntimeSettings, stop: threading.Event) -> None:
    sources = settings.sources.model_copy(update={"pvc_root": settings.pvc_root})
    folder = base_folder(settings, sources, StartupProgress(time.monotonic))
    log.info("base found", extra={"base": settings.label, "folder": str(folder.path), "digest": folder.digest or "-"})
    make_node(settings, folder.path).run(stop, settings.drain_grace_s)


def _log_refusal(error: BaseException) -> None:
    """The operator shows the last line with a reason."""
    known = error.reason.value if isinstance(error, EngineStartError) else None
    extra = {} if known is None else {"reason": known}
    log.error("the base cannot be served: %s", reason_of(error), exc_info=_trace(error), extra=extra)


def _bring_up(settings: RuntimeSettings, engine_factory: EngineFactory, progress: StartupProgress) -> LoadedBase:
    """Starts the base, then exempts all present objects from garbage collection.

    With torch and transformers they are nearly half a million, which live as long as the process: a full collection
    while serving would delay every request by a third of a second.
    """
    gc.disable()
    try:
        base = bring_up(settings, engine_factory, progress, meanwhile=import_framework)
        gc.collect()
        gc.freeze()
        return base
    finally:
        gc.enable()


async def _serve(runtime: Runtime, base: LoadedBase, stopping: asyncio.Task[bool]) -> int:
    runtime.serve(base)
    log.info("ready", extra={"base": runtime.settings.label})
    sweeping = asyncio.create_task(runtime.sweep_forever())
    try:
        either: list[asyncio.Future[Any]] = [sweeping, stopping]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if sweeping.done():
            stopping.cancel()
            if not sweeping.cancelled() and (error := sweeping.exception()) is not None:
                log.error("the sweeper failed", exc_info=error)
            log.error("the engine has died; ending the process")
            runtime.engine_died()
            return 1
        log.info("received a signal to stop: draining")
        await runtime.drain(notice_s=runtime.settings.drain_notice_s, grace_s=runtime.settings.drain_grace_s)
        return 0
    finally:
        sweeping.cancel()
        await runtime.close()
        await asyncio.to_thread(base.engine.stop, ENGINE_STOP_S)  # requests that arrive meanwhile are refused
        await runtime.close_accounts()
        base.tokenizer.close()
        base.grammars.close()
        log.info("stopped")


@contextlib.asynccontextmanager
async def _listening(runtime: Runtime) -> AsyncIterator[None]:
    """HTTP answers while inside. Listening sockets close before those of connections.

    Raises SettingsError if the certificate of the settings cannot be used.
    """
    settings = runtime.settings
    tls = None if settings.tls_dir is None else ServerCertificate(settings.tls_dir).context
    runner = web.AppRunner(
        make_app(runtime),
        access_log=None,
        handler_cancellation=True,
        auto_decompress=False,
        max_field_size=HEADER_MAX_BYTES,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.listen_port, ssl_context=tls).start()
        for address in runner.addresses:
            log.info("listening on %s://%s:%d", "http" if tls is None else "https", *address[:2])
        async with _probed(runtime):
            yield
    finally:
        for site in list(runner.sites):
            await site.stop()
        await asyncio.sleep(LAST_ARRIVALS_S)
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _probed(runtime: Runtime) -> AsyncIterator[None]:
    """Probes and scrapers are answered in a thread of their own while inside, on the metrics port if there is one."""
    port = runtime.settings.metrics_port
    if port is None:
        yield
        return
    access, heartbeat = MetricsAccess(runtime.settings), Heartbeat(runtime.settings.loop_stuck_s)
    loop = asyncio.get_running_loop()
    beating = loop.create_task(heartbeat.run(), name="heartbeat")
    try:
        async with in_own_thread(lambda: probes(runtime, access, heartbeat, loop, port), "probes"):
            yield
    finally:
        beating.cancel()


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a daemon thread, which does not keep the process from ending."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # so that a caller that stops waiting (SIGTERM) does not cancel it

    def run_it() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run_it, name="bring-up", daemon=True).start()
    return future


def _trace(error: BaseException) -> BaseException | None:
    """The error, for its traceback, unless it is one of ours, whose message is enough."""
    return None if isinstance(error, (ArtifactError, BaseError, EngineStartError, TokenizerError, OSError)) else error


if __name__ == "__main__":
    sys.exit(main())
