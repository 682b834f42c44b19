"""`python -m lorapool_trainer serve`: the trainer of one base, as the operator runs it.

HTTP answers at once; /readyz answers 200 when the base is loaded. SIGTERM: the cycle is completed, each job writes a
checkpoint, exit 0. Exit 0 too after `idle_after_s` without a job that can be trained; 1 when the base cannot be loaded
or the engine fails; 2 for invalid settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from aiohttp import web

from lorapool_api.common import FailureReason
from lorapool_api.liveness import Heartbeat, in_own_thread
from lorapool_api.logs import set_up_logs
from lorapool_api.protocol import ROUTE_HEALTH, ROUTE_METRICS, ROUTE_READY
from lorapool_api.settings import SettingsError, read
from lorapool_api.store_protocol import StoreAccess
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_api.trust.tls import ServerCertificate
from lorapool_api.tuning.trainer_protocol import TrainerBase, TrainerJob
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.sources.store_client import StoreClient
from lorapool_runtime.cgroup import usable_cores, usable_memory_bytes
from lorapool_runtime.serving.service import read_base_chat
from lorapool_runtime.startup import BaseError, BaseFolder, base_folder, reason_of
from lorapool_runtime.startup_progress import StartupProgress
from lorapool_trainer.data.encoder import Encoder
from lorapool_trainer.engine import Engine, Numerics
from lorapool_trainer.local_files import base_identity
from lorapool_trainer.serve.server import EXPOSITION, TrainerState, make_app
from lorapool_trainer.serve.settings import TrainerSettings
from lorapool_trainer.serve.store_files import ObjectStore
from lorapool_trainer.serve.worker import Worker
from lorapool_trainer.session import BaseName, Session, SessionLimits
from lorapool_trainer.suspects import Suspects

log = logging.getLogger("lorapool_trainer")

IDLE_CHECK_S = 0.5
JOBS_FOLDER = "jobs"


class Loaded(NamedTuple):
    session: Session
    base: TrainerBase
    memory_limit_bytes: int


def main() -> int:
    """Runs until the end; returns the process's exit code."""
    try:
        settings = read(TrainerSettings, os.environ)
        set_up_logs("trainer", settings.log_level, settings.log_format)
        torch.set_num_threads(settings.threads or usable_cores())
        code = asyncio.run(run(settings))
    except SettingsError as error:
        error.report("lorapool-trainer")
        return 2
    sys.stderr.flush()
    os._exit(code)  # a thread may still load the base, and cannot be interrupted


async def run(settings: TrainerSettings) -> int:
    """Serves until the end. Returns the exit code. Raises SettingsError."""
    progress = StartupProgress(time.monotonic)
    state = TrainerState(settings, progress.report)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _listening(state):
        loading = asyncio.wrap_future(_in_thread(lambda: load(settings, progress)))
        stopping = asyncio.ensure_future(stop.wait())
        either: list[asyncio.Future[Any]] = [loading, stopping]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return 0
        if (error := loading.exception()) is not None:
            known = isinstance(error, (ArtifactError, BaseError, OSError, ValueError))
            log.error("the base cannot be loaded: %s", reason_of(error), exc_info=None if known else error)
            return 1
        return await _train(state, loading.result(), stop)


def load(settings: TrainerSettings, progress: StartupProgress) -> Loaded:
    """Fetches and loads the base. Blocks."""
    limit = settings.memory_bytes or memory_limit(settings)
    own = settings.of_base()
    folder = base_folder(own, own.sources, progress)
    progress.begin_load()
    device = device_of(settings)
    asked = settings.numerics
    default = Numerics.EXACT if device == "cpu" else Numerics.FAST
    numerics = default if asked is None else Numerics(asked.value)
    engine = Engine.load(
        str(folder.path),
        dtype=settings.dtype,
        device=device,
        numerics=numerics,
        token_budget=settings.tokens_per_cycle,
    )
    root = settings.cache_dir.expanduser()
    root.mkdir(parents=True, exist_ok=True)
    session = Session(
        engine,
        Encoder.of_base(folder.path, read_base_chat(settings.chat_file), rows=engine.base.vocab_size),
        BaseName(settings.label, folder.digest or base_identity(folder.path)),
        Suspects(root),
        SessionLimits(settings.max_jobs, limit),
    )
    return Loaded(session, _base(engine, folder, device), limit)


def _base(engine: Engine, folder: BaseFolder, device: str) -> TrainerBase:
    return TrainerBase(digest=folder.digest, dtype=str(engine.base.model.dtype).removeprefix("torch."), device=device)


def device_of(settings: TrainerSettings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_limit(settings: TrainerSettings) -> int:
    """Memory that this process may use, read before the base is loaded."""
    if device_of(settings) == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return usable_memory_bytes()


async def _train(state: TrainerState, loaded: Loaded, stop: asyncio.Event) -> int:
    loop = asyncio.get_running_loop()

    def changed(at_once: bool) -> None:
        loop.call_soon_threadsafe(state.changes.bump if at_once else state.changes.bump_soon)

    folder = state.settings.cache_dir.expanduser() / JOBS_FOLDER
    worker = Worker(loaded.session, folder, make_client, changed)
    state.base, state.memory_limit_bytes, state.worker = loaded.base, loaded.memory_limit_bytes, worker
    worker.start()
    state.changes.bump()
    log.info("ready", extra={"base": state.settings.label})
    while not (stop.is_set() or worker.ended.done() or _is_idle(state)):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), IDLE_CHECK_S)
    state.draining = True
    state.changes.bump()
    worker.stop()
    return await _ended(state, worker)


async def _ended(state: TrainerState, worker: Worker) -> int:
    try:
        await asyncio.wait_for(asyncio.wrap_future(worker.ended), state.settings.drain_grace_s)
    except TimeoutError:
        log.error("the cycle did not end in time; work since the last checkpoints is lost")
        return 0
    except Exception:
        log.exception("the engine failed; ending the process")
        return 1
    state.changes.close()
    log.info("stopped")
    return 0


def _is_idle(state: TrainerState) -> bool:
    since_s = state.published.idle_since_s
    return since_s is not None and time.monotonic() - since_s >= state.settings.idle_after_s


def make_client(job: TrainerJob) -> ObjectStore:
    """A client of the store with the rights of the job. Raises ArtifactError for a job without access."""
    if job.store is None:
        message = "The job came without access to the store; set the operator's store URL."
        raise ArtifactError(FailureReason.UNAUTHORIZED, message)
    return StoreClient(StoreAccess(url=job.store.url, token=job.store.token, ca=job.store.ca))


@contextlib.asynccontextmanager
async def _listening(state: TrainerState) -> AsyncIterator[None]:
    """HTTP answers while inside, and the probes' port if there is one. Raises SettingsError."""
    settings = state.settings
    tls = None if settings.tls_dir is None else ServerCertificate(settings.tls_dir).context
    runner = web.AppRunner(make_app(state), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.listen_port, ssl_context=tls).start()
        log.info("listening on %s:%d", *runner.addresses[0][:2])
        async with _probed(state):
            yield
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _probed(state: TrainerState) -> AsyncIterator[None]:
    port = state.settings.metrics_port
    if port is None:
        yield
        return
    heartbeat = Heartbeat(state.settings.loop_stuck_s)
    beating = asyncio.create_task(heartbeat.run())
    try:
        async with in_own_thread(lambda: _probes(state, heartbeat, port), "probes"):
            yield
    finally:
        beating.cancel()


@contextlib.asynccontextmanager
async def _probes(state: TrainerState, heartbeat: Heartbeat, port: int) -> AsyncIterator[None]:
    """Probes and metrics in a thread of their own, so that no request delays them."""
    access = MetricsAccess(state.settings)

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if heartbeat.alive else web.Response(text="stuck\n", status=503)

    async def readiness(_: web.Request) -> web.Response:
        return web.Response(text="ready\n") if state.ready else web.Response(text="not ready\n", status=503)

    async def metrics(request: web.Request) -> web.Response:
        if not access.permits(request.headers.get("Authorization")):
            return web.Response(status=401)
        return web.Response(body=state.metrics.render(), headers=EXPOSITION)

    app = web.Application()
    app.router.add_get(ROUTE_HEALTH, health)
    app.router.add_get(ROUTE_READY, readiness)
    app.router.add_get(ROUTE_METRICS, metrics)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, state.settings.host, port, ssl_context=access.tls).start()
        yield
    finally:
        await runner.cleanup()


def _in_thread(work: Callable[[], Loaded]) -> Future[Loaded]:
    """Runs `work` in a daemon thread, which does not keep the process from ending."""
    future: Future[Loaded] = Future()
    future.set_running_or_notify_cancel()

    def run_it() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run_it, name="load", daemon=True).start()
    return future
