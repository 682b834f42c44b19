"""Creates, finds and steers fine-tuning jobs as FineTuneJob objects of the API server, whose watch answers most calls.

A call that a client repeats, because its answer was lost, leads to the job of the first one: the object's name is a
hash of key and body with a number, so two gateways cannot both create it, and a list by label shows what there is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

from lorapool_api.common import GROUP, VERSION
from lorapool_api.openai import (
    InvalidRequestError,
    QuotaExceededError,
    ServerError,
    TooManyRequestsError,
    UnavailableError,
    UnknownJobError,
)
from lorapool_api.tuning.finetunejob import PLURAL
from lorapool_api.tuning.states import JobReason, RunState
from lorapool_gateway.routing.kube import KubeError
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.routing.source import ObjectCache
from lorapool_gateway.tuning.job_object import (
    LABEL_REQUEST,
    Call,
    Inputs,
    Job,
    job_name,
    kept_of,
    manifest,
    parse_object,
)
from lorapool_gateway.tuning.job_request import JobRequest

REPEATED_S = 600.0
"""A repeated call that comes later than this makes a job of its own."""
UNSEEN_S = 30.0
"""A created job that the watch has not shown after this is not counted any more: it was deleted at once."""
TRIES = 5
"""Gateways that create jobs of the same call at the same time."""
CONCURRENT_READS = 8
"""Objects that are read at the same time because the watch has not shown them."""


class ObjectApi(Protocol):
    """The calls of the API server that this package makes."""

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]: ...

    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]: ...

    async def merge(self, path: str, patch: Mapping[str, Any]) -> dict[str, Any]: ...

    async def delete(self, path: str, uid: str) -> None: ...


class Jobs:
    """The jobs of all organizations; every method acts in one namespace."""

    def __init__(
        self,
        api: ObjectApi,
        caches: Sequence[ObjectCache[Job]],
        *,
        most_unfinished: int,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        """`most_unfinished`: of one namespace; a further job is refused."""
        self._api = api
        self._caches = caches
        self._most_unfinished = most_unfinished
        self._now_unix_s = now_unix_s
        self._made: dict[ObjectRef, float] = {}
        """Jobs that this gateway creates, by time, until the watch shows them."""
        self._reads = asyncio.Semaphore(CONCURRENT_READS)

    async def create(
        self, request: JobRequest, inputs: Inputs, namespace: str, hashed: str, *, repeated: bool, arrived_unix_s: float
    ) -> Job:
        """Creates the job of a call. `repeated`: the client has sent it before, and may have made the job then."""
        for _ in range(TRIES):
            before = await self._same_calls(namespace, hashed)
            if (known := _first_of(before, repeated, arrived_unix_s)) is not None:
                return known
            self._check_quotas(namespace)
            number = max((job.call.number for job in before if job.call is not None), default=-1) + 1
            call = Call(arrived_unix_s, number, kept_of(request))
            ref = ObjectRef(namespace, job_name(hashed, number))
            self._made[ref] = self._now_unix_s()
            try:
                return parse_object(
                    await self._api.create(_path(namespace), manifest(request, inputs, namespace, hashed, call))
                )
            except KubeError as error:
                self._made.pop(ref, None)
                if error.status != HTTPStatus.CONFLICT:
                    raise _refused(error) from error
        raise UnavailableError("Other calls create the same job. Try again.", retry_after_s=1)

    def _check_quotas(self, namespace: str) -> None:
        """Raises TooManyRequestsError where the operator would refuse one more job, or let it wait for a month's end.

        What is not known here is left to the operator.
        """
        now = self._now_unix_s()
        known = {ref for cache in self._caches for ref in cache.objects}
        self._made = {ref: at for ref, at in self._made.items() if ref not in known and now < at + UNSEEN_S}
        jobs = [job for cache in self._caches for job in cache.objects.values() if job.ref.namespace == namespace]
        unfinished = [job for job in jobs if not job.ended]
        if any(job.status.queue is not None and job.status.queue.reason == JobReason.TOKEN_QUOTA for job in unfinished):
            raise QuotaExceededError(
                f"The organization {namespace} trained as many tokens this month as it may. Its jobs go on next month."
            )
        count = len(unfinished) + sum(ref.namespace == namespace for ref in self._made)
        if count >= self._most_unfinished:
            raise TooManyRequestsError(
                f"The organization {namespace} has {count} unfinished fine-tuning jobs, as many as it may. Wait for "
                "some to end, or cancel some."
            )

    async def find_call(self, namespace: str, hashed: str, arrived_unix_s: float) -> Job | None:
        """The job that a repeated call has made before."""
        return _first_of(await self._same_calls(namespace, hashed), True, arrived_unix_s)

    async def find(self, namespace: str, job_id: str) -> Job:
        """Raises UnknownJobError for an unknown job and one of another namespace alike."""
        ref = ObjectRef(namespace, job_id)
        for cache in self._caches:
            if (job := cache.objects.get(ref)) is not None:
                return job
        return await self._read(ref)

    def all(self, namespace: str) -> list[Job]:
        """The jobs of a namespace, the newest first. Raises UnavailableError until they are known."""
        if not all(cache.synced for cache in self._caches):
            raise UnavailableError("The jobs are not known yet. Try again.", retry_after_s=2)
        found = [job for cache in self._caches for ref, job in cache.objects.items() if ref.namespace == namespace]
        return sorted(found, key=lambda job: (-job.created_unix_s, job.id))

    async def steer(self, namespace: str, job_id: str, run: RunState) -> Job:
        """Asks that a job is cancelled, paused or resumed. Raises InvalidRequestError if it has ended."""
        job = await self.find(namespace, job_id)
        if job.ended:
            raise _has_ended(job)
        try:
            return parse_object(await self._api.merge(f"{_path(namespace)}/{job_id}", {"spec": {"run": run.value}}))
        except KubeError as error:
            if error.status == HTTPStatus.UNPROCESSABLE_ENTITY:  # it was cancelled meanwhile, which is final
                raise _has_ended(job) from error
            if error.status == HTTPStatus.NOT_FOUND:
                raise UnknownJobError(job_id) from error
            raise _refused(error) from error

    async def _same_calls(self, namespace: str, hashed: str) -> list[Job]:
        """The jobs of calls with this key and body, the earliest first, as the API server has them now."""
        try:
            listed = await self._api.get(_path(namespace), {"labelSelector": f"{LABEL_REQUEST}={hashed}"})
        except KubeError as error:
            raise _refused(error) from error
        jobs = [parse_object(raw) for raw in listed.get("items") or ()]
        return sorted((job for job in jobs if job.call is not None), key=_arrival)

    async def _read(self, ref: ObjectRef) -> Job:
        """A job that the watch has not shown yet, as after its creation by another gateway."""
        if not ref.name.startswith("ftjob-") or len(ref.name) > 63 or not ref.name.replace("-", "").isalnum():
            raise UnknownJobError(ref.name)
        try:
            async with self._reads:
                return parse_object(await self._api.get(f"{_path(ref.namespace)}/{ref.name}"))
        except KubeError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                raise UnknownJobError(ref.name) from error
            raise _refused(error) from error


def _first_of(before: Sequence[Job], repeated: bool, arrived_unix_s: float) -> Job | None:
    """The job that this very call has made already: earlier, if the client repeats it, or through a repetition that
    was faster than this first attempt."""
    if not before:
        return None
    newest = before[-1]
    if _arrival(newest) > arrived_unix_s:
        return newest
    return newest if repeated and arrived_unix_s - _arrival(newest) <= REPEATED_S else None


def _arrival(job: Job) -> float:
    return job.call.arrived_unix_s if job.call is not None else 0.0


def _path(namespace: str) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"


def _has_ended(job: Job) -> InvalidRequestError:
    return InvalidRequestError(f"The job {job.id} has ended ({job.shown_state}).", code="job_ended")


def _refused(error: KubeError) -> InvalidRequestError | UnavailableError | ServerError:
    """The error of a call that the API server refused. Never 409: clients would repeat it."""
    if error.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
        return InvalidRequestError(f"The job cannot be created: {error}", code="invalid_job")
    if error.status in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
        return ServerError("The gateway may not use fine-tuning jobs in this namespace; its log says more.")
    return UnavailableError("The API server does not answer. Try again.", retry_after_s=5)
