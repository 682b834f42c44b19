"""The HTTP routes of a trainer. Each answers from what the worker published, or hands it a command."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web
from pydantic import ValidationError

from lorapool_api.logs import audit
from lorapool_api.openai import (
    ApiError,
    InvalidRequestError,
    MethodNotAllowedError,
    RouteNotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from lorapool_api.protocol import LONG_POLL_MAX_S, ROUTE_HEALTH, ROUTE_METRICS, ROUTE_READY, StartupReport
from lorapool_api.release import release
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge
from lorapool_api.tuning.trainer_protocol import (
    ROUTE_JOB,
    ROUTE_TRAINER,
    PutJobAnswer,
    TrainerBase,
    TrainerJob,
    TrainerMemory,
    TrainerSnapshot,
)
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.clock import Clock
from lorapool_runtime.events import Changes
from lorapool_runtime.serving.tokens import BearerTokens
from lorapool_trainer.serve.metrics import TrainerMetrics
from lorapool_trainer.serve.settings import TrainerSettings
from lorapool_trainer.serve.worker import Published, Worker

log = logging.getLogger(__name__)

BODY_MAX_BYTES = 2**20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NOTHING = Published()
EXPOSITION = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}


class TrainerState:
    """What the routes share. Belongs to the event loop."""

    def __init__(self, settings: TrainerSettings, startup: Callable[[], StartupReport]) -> None:
        """Raises SettingsError for a token file that cannot be used."""
        self.settings = settings
        self.boot_id = uuid.uuid4().hex
        self.started_unix_s = time.time()
        self.tokens = BearerTokens(settings, Clock())
        self.changes = Changes()
        self.metrics = TrainerMetrics(settings.label, lambda: self.published, lambda: self.memory_limit_bytes)
        self.draining = False
        self.base: TrainerBase | None = None
        self.memory_limit_bytes = 0
        self.worker: Worker | None = None
        self._startup = startup

    @property
    def published(self) -> Published:
        return self.worker.published if self.worker is not None else NOTHING

    @property
    def ready(self) -> bool:
        return self.worker is not None and not self.draining

    def snapshot(self) -> TrainerSnapshot:
        found = self.published
        return TrainerSnapshot(
            seq=self.changes.seq,
            boot_id=self.boot_id,
            started_unix_s=self.started_unix_s,
            now_unix_s=time.time(),
            trainer_version=release(),
            ready=self.worker is not None,
            draining=self.draining,
            base=self.base,
            startup=self._startup() if self.worker is None else None,
            memory=self._memory(found),
            busy_seconds=round(found.busy_s, 3),
            idle_since_unix_s=found.idle_since_unix_s,
            jobs=list(found.jobs),
        )

    def _memory(self, found: Published) -> TrainerMemory | None:
        if found.memory is None:
            return None
        return TrainerMemory(
            limit_bytes=self.memory_limit_bytes,
            base_bytes=found.memory.base,
            jobs_bytes=found.memory.adapters,
            activation_bytes=found.memory.activations,
        )


def make_app(state: TrainerState) -> web.Application:
    routes = _Routes(state)
    app = web.Application(middlewares=[routes.answer_errors, routes.check_token], client_max_size=BODY_MAX_BYTES)
    app.router.add_get(ROUTE_TRAINER, routes.snapshot)
    app.router.add_put(ROUTE_JOB, routes.put_job)
    app.router.add_delete(ROUTE_JOB, routes.delete_job)
    app.router.add_get(ROUTE_HEALTH, routes.health)
    app.router.add_get(ROUTE_READY, routes.readiness)
    app.router.add_get(ROUTE_METRICS, routes.metrics)
    return app


class _Routes:
    def __init__(self, state: TrainerState) -> None:
        self._state = state

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns an exception into a response in OpenAI's error format. The only place that does."""
        try:
            return await handler(request)
        except ApiError as error:
            return _refused(error)
        except web.HTTPNotFound:
            return _refused(RouteNotFoundError("There is no such route."))
        except web.HTTPMethodNotAllowed:
            return _refused(MethodNotAllowedError("The route has no such method."))
        except web.HTTPRequestEntityTooLarge:
            return _refused(InvalidRequestError(f"The body is longer than {BODY_MAX_BYTES} bytes."))

    @web.middleware
    async def check_token(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses requests without the token, except to the probes. A poll may have its proof instead."""
        is_probe = request.match_info.handler in (self.health, self.readiness)
        authorization = request.headers.get("Authorization", "")
        challenge = Challenge.parse(authorization) if request.match_info.handler == self.snapshot else None
        proven = challenge is not None and self._state.tokens.accepts_poll(challenge)
        if not (is_probe or proven or self._state.tokens.accepts(authorization)):
            audit("request refused", remote=request.remote, code=401)
            raise UnauthenticatedError("Missing or wrong bearer token.")
        return await handler(request)

    async def snapshot(self, request: web.Request) -> web.Response:
        after, wait_s = _poll_params(request)
        if request.query.get("boot", "") == self._state.boot_id:
            await self._state.changes.wait(after, wait_s)
        body = self._state.snapshot().model_dump_json(by_alias=True, exclude_none=True).encode()
        challenge = Challenge.parse(request.headers.get("Authorization", ""))
        proof = self._state.tokens.answer(challenge, body) if challenge is not None else None
        headers = {HEADER_PROOF: proof} if proof is not None else None
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def put_job(self, request: web.Request) -> web.Response:
        worker, uid = self._worker(), request.match_info["uid"]
        try:
            job = TrainerJob.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise InvalidRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
        if (job.lora.rank or 0) > self._state.settings.max_rank:
            most = self._state.settings.max_rank
            raise InvalidRequestError(f"lora.rank {job.lora.rank} is more than {most}, which this trainer accepts.")
        try:
            report = await asyncio.wrap_future(worker.call(lambda: worker.put(uid, job)))
        except ArtifactError as error:
            raise UnavailableError(error.message, code="store_unavailable", retry_after_s=10) from error
        audit("job registered", job=job.display, remote=request.remote)
        answer = PutJobAnswer(boot_id=self._state.boot_id, job=report)
        return web.Response(
            text=answer.model_dump_json(by_alias=True, exclude_none=True), content_type="application/json"
        )

    async def delete_job(self, request: web.Request) -> web.Response:
        worker, uid = self._worker(), request.match_info["uid"]
        await asyncio.wrap_future(worker.call(lambda: worker.delete(uid)))
        return web.Response(status=204)

    def _worker(self) -> Worker:
        if self._state.worker is None or self._state.draining:
            what = "is about to end" if self._state.draining else "loads its base"
            raise UnavailableError(f"The trainer {what}; try again.", code="not_ready", retry_after_s=2)
        return self._state.worker

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readiness(self, _request: web.Request) -> web.Response:
        if self._state.ready:
            return web.Response(text="ready\n")
        return web.Response(text="draining\n" if self._state.draining else "loading\n", status=503)

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._state.metrics.render(), headers=EXPOSITION)


def _refused(error: ApiError) -> web.Response:
    return web.json_response(error.body(), status=error.status, headers=error.headers())


def _poll_params(request: web.Request) -> tuple[int, float]:
    after, wait = request.query.get("after", "0"), request.query.get("wait", "0")
    try:
        return int(after), min(max(0.0, float(wait)), LONG_POLL_MAX_S)
    except ValueError as error:
        raise InvalidRequestError("`after` must be a whole number and `wait` a number of seconds.") from error
