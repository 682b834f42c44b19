"""The paths of the API for files and fine-tuning, and what each call does.

Handlers return the JSON value of an answer, or a response that they have sent themselves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web

from lorapool_api.common import GROUP, VERSION
from lorapool_api.loraadapter import PLURAL as ADAPTERS
from lorapool_api.openai import (
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
    UnknownFileError,
)
from lorapool_api.tuning.states import JobState, RunState
from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.routing.kube import KubeError
from lorapool_gateway.routing.live_tables import RouteSource
from lorapool_gateway.routing.objects import AdapterRoute, BaseRoute
from lorapool_gateway.tuning import events as job_events
from lorapool_gateway.tuning.files import FileRecord, Files
from lorapool_gateway.tuning.job_object import Inputs, Job, request_hash, shown
from lorapool_gateway.tuning.job_request import JobRequest, parse_job
from lorapool_gateway.tuning.jobs import Jobs, ObjectApi
from lorapool_gateway.tuning.organization import HEADER_ORGANIZATION, Caller, caller_of
from lorapool_gateway.tuning.pages import listed, page
from lorapool_gateway.tuning.store_client import ObjectNotFoundError, StoreClient
from lorapool_gateway.tuning.upload import UploadLimits, receive

ROUTE_FILES = "/v1/files"
ROUTE_JOBS = "/v1/fine_tuning/jobs"
HEADER_RETRIES = "x-stainless-retry-count"
_PART = r"([A-Za-z0-9_:.-]{1,128})"
_FILE = re.compile(f"{ROUTE_FILES}/{_PART}")
_CONTENT = re.compile(f"{ROUTE_FILES}/{_PART}/content")
_JOB = re.compile(f"{ROUTE_JOBS}/{_PART}")
_OF_JOB = re.compile(f"{ROUTE_JOBS}/{_PART}/(cancel|pause|resume|events|checkpoints)")
_RESULT = re.compile(r"file-result-([a-z2-7]{24})")
_RUNS = {"cancel": RunState.CANCELLED, "pause": RunState.PAUSED, "resume": RunState.RUN}

Answer = Mapping[str, Any] | web.StreamResponse
Handler = Callable[["TuningCall"], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class TuningCall:
    """One call of a key that may fine-tune."""

    request: web.BaseRequest
    caller: Caller
    headers: Callable[[], dict[str, str]]
    """Of every response."""
    body: Callable[[], Awaitable[bytes]]
    """The body of a call other than an upload."""


class Tuning:
    """Everything behind the routes."""

    def __init__(
        self, store: StoreClient, files: Files, jobs: Jobs, api: ObjectApi, routes: RouteSource, limits: UploadLimits
    ) -> None:
        self._store = store
        self._files = files
        self._jobs = jobs
        self._api = api
        self._routes = routes
        self._limits = limits

    def handlers(self, path: str) -> dict[str, Handler] | None:
        """The handlers of a path by method; None if it is no path of this API."""
        if path == ROUTE_FILES:
            return {"GET": self._list_files, "POST": self._upload}
        if path == ROUTE_JOBS:
            return {"GET": self._list_jobs, "POST": self._create_job}
        if found := _FILE.fullmatch(path):
            return {"GET": partial(self._get_file, found[1]), "DELETE": partial(self._delete_file, found[1])}
        if found := _CONTENT.fullmatch(path):
            return {"GET": partial(self._content, found[1])}
        if found := _JOB.fullmatch(path):
            return {"GET": partial(self._get_job, found[1])}
        if found := _OF_JOB.fullmatch(path):
            job_id, what = found[1], found[2]
            if what in _RUNS:
                return {"POST": partial(self._steer, job_id, _RUNS[what])}
            return {"GET": partial(self._events if what == "events" else self._checkpoints, job_id)}
        return None

    # --- files

    async def _upload(self, call: TuningCall) -> Answer:
        record = await receive(call.request, self._files, call.caller.namespace, self._limits)
        return record.shown()

    async def _list_files(self, call: TuningCall) -> Answer:
        return await self._files.listing(call.caller.namespace, call.request.query)

    async def _get_file(self, file_id: str, call: TuningCall) -> Answer:
        namespace = call.caller.namespace
        if (job := await self._job_of_result(namespace, file_id)) is not None:
            return await self._result_file(job, file_id)
        return (await self._files.find(namespace, file_id)).shown()

    async def _delete_file(self, file_id: str, call: TuningCall) -> Answer:
        namespace = call.caller.namespace
        if (job := await self._job_of_result(namespace, file_id)) is not None:
            await self._result_file(job, file_id)
            await self._store.delete(namespace, _result_key(job))
            return {"id": file_id, "object": "file", "deleted": True}
        return await self._files.delete(namespace, file_id)

    async def _content(self, file_id: str, call: TuningCall) -> Answer:
        namespace = call.caller.namespace
        job = await self._job_of_result(namespace, file_id)
        opened = (
            self._files.open_object(namespace, _result_key(job), file_id)
            if job is not None
            else self._files.open(namespace, file_id)
        )
        async with opened as (size, chunks):
            response = web.StreamResponse(headers={**call.headers(), "Content-Type": "application/octet-stream"})
            response.content_length = size
            await response.prepare(call.request)
            async for chunk in chunks:
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _job_of_result(self, namespace: str, file_id: str) -> Job | None:
        """The job whose metrics a file id stands for. Raises UnknownFileError if there is none such."""
        found = _RESULT.fullmatch(file_id)
        if found is None:
            return None
        jobs = [job for job in self._jobs.all(namespace) if job.id == f"ftjob-{found[1]}"]
        if not jobs or jobs[0].state is not JobState.SUCCEEDED:
            raise UnknownFileError(file_id)
        return jobs[0]

    async def _result_file(self, job: Job, file_id: str) -> dict[str, Any]:
        try:
            stored = await self._store.head(job.ref.namespace, _result_key(job))
        except ObjectNotFoundError:
            raise UnknownFileError(file_id) from None
        record = FileRecord(
            id=file_id,
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            bytes=stored.size,
            sha256="",
            created_at=int(job.created_unix_s),
        )
        return record.shown()

    # --- jobs

    async def _create_job(self, call: TuningCall) -> Answer:
        arrived_unix_s, caller = time.time(), call.caller
        body = await call.body()
        request, hashed = parse_job(body), request_hash(caller.key.id, caller.namespace, body)
        repeated = call.request.headers.get(HEADER_RETRIES, "0") not in ("", "0")
        if repeated and (known := await self._jobs.find_call(caller.namespace, hashed, arrived_unix_s)) is not None:
            return _shown(known)  # also where its files were deleted meanwhile
        inputs = await self._inputs(request, caller)
        return _shown(
            await self._jobs.create(
                request, inputs, caller.namespace, hashed, repeated=repeated, arrived_unix_s=arrived_unix_s
            )
        )

    async def _inputs(self, request: JobRequest, caller: Caller) -> Inputs:
        base, init_from = self._base(request.model, caller)
        bound = base.spec.fine_tuning.max_rank or base.spec.lora.max_rank
        if (request.lorapool.rank or 0) > bound:
            raise InvalidRequestError(
                f"lorapool.rank must not be above {bound}, the largest rank of `{request.model[:128]}`.",
                param="lorapool.rank",
                code="invalid_value",
            )
        training = await self._data(caller.namespace, request.training_file, "training_file")
        validation = (
            await self._data(caller.namespace, request.validation_file, "validation_file")
            if request.validation_file
            else None
        )
        return Inputs(base.ref, base.spec, init_from, training, validation)

    def _base(self, model: str, caller: Caller) -> tuple[BaseRoute, str | None]:
        """The base of a model name, and the name of the adapter that is continued, if it names one.

        Raises ModelNotFoundError, alike whether the model is unknown, forbidden, or not to be tuned.
        """
        table = self._routes.table
        entry, init_from = table.find(model, caller.key), None
        if isinstance(entry, AdapterRoute):
            if entry.ref.namespace != caller.namespace:
                raise ModelNotFoundError(model)
            init_from = entry.ref.name
            entry = table.bases.get(entry.base_ref, entry)
        if not isinstance(entry, BaseRoute) or not entry.spec.fine_tuning.enabled or not entry.admits(caller.namespace):
            raise ModelNotFoundError(model)
        return entry, init_from

    async def _data(self, namespace: str, file_id: str, param: str) -> FileRecord:
        """Raises InvalidRequestError, alike whether the file is unknown or another organization's."""
        try:
            return await self._files.find(namespace, file_id)
        except UnknownFileError:
            raise InvalidRequestError(
                f"{param}: the file {file_id[:64]!r} does not exist. Upload it with the purpose fine-tune.",
                param=param,
                code="invalid_file",
            ) from None

    async def _list_jobs(self, call: TuningCall) -> Answer:
        query = call.request.query
        wanted = {name[9:-1]: value for name, value in query.items() if name.startswith("metadata[")}
        jobs = [
            job
            for job in self._jobs.all(call.caller.namespace)
            if wanted.items() <= job.metadata.items() and not (query.get("metadata") == "null" and job.metadata)
        ]
        found, more = page(jobs, query, lambda job: job.id, default=20, most=100)
        return listed([_shown(job) for job in found], more)

    async def _get_job(self, job_id: str, call: TuningCall) -> Answer:
        return _shown(await self._jobs.find(call.caller.namespace, job_id))

    async def _steer(self, job_id: str, run: RunState, call: TuningCall) -> Answer:
        return _shown(await self._jobs.steer(call.caller.namespace, job_id, run))

    async def _events(self, job_id: str, call: TuningCall) -> Answer:
        job = await self._jobs.find(call.caller.namespace, job_id)
        return await job_events.events(self._store, job, call.request.query)

    async def _checkpoints(self, job_id: str, call: TuningCall) -> Answer:
        return job_events.checkpoints(await self._jobs.find(call.caller.namespace, job_id), call.request.query)

    # --- models

    async def delete_model(self, model: str, call: TuningCall) -> Answer:
        """Deletes the LoraAdapter of a fine-tuned model and its files in the store.

        Raises ModelNotFoundError, also for a model that no job has made: its object was written by hand.
        """
        entry = self._routes.table.find(model, call.caller.key)
        if not isinstance(entry, AdapterRoute) or not entry.tuned or entry.ref.namespace != call.caller.namespace:
            raise ModelNotFoundError(model)
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{entry.ref.namespace}/{ADAPTERS}/{entry.ref.name}"
        try:
            await self._api.delete(path, entry.uid)
        except KubeError as error:
            if error.status in (404, 409):  # it is gone, or another object has its name by now
                raise ModelNotFoundError(model) from error
            raise UnavailableError("The API server does not answer. Try again.", retry_after_s=5) from error
        own = f"store://{entry.ref.namespace}/adapters/"
        if entry.spec.source.uri.startswith(own) and (folder := entry.spec.source.uri.removeprefix(own).strip("/")):
            await self._store.delete(entry.ref.namespace, f"adapters/{folder}/")
        return {"id": model, "object": "model", "deleted": True}


def caller_for(key: ApiKey, request: web.BaseRequest) -> Caller:
    """For which namespace a request acts. Raises PermissionDeniedError, InvalidRequestError."""
    return caller_of(key, request.headers.get(HEADER_ORGANIZATION))


def _shown(job: Job) -> dict[str, Any]:
    files = [f"file-result-{job.id.removeprefix('ftjob-')}"] if job.state is JobState.SUCCEEDED else []
    return shown(job, files)


def _result_key(job: Job) -> str:
    return f"jobs/{job.uid}/result_files/step_metrics.csv"
