"""Turns a parsed request into an accepted response: resolve, wake, hold, pick, attempt, until the deadline.

A request is resolved again in each round and only until a runtime admits it, so a response comes from one digest
only. An admitted request is never sent again. One whose connection was lost before that is sent again once, since it
may itself have ended the runtime; one whose pod is lost is sent to the next. Every wait is bounded and ends when the
client disconnects.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from lorapool_api.common import BASE_TARGET
from lorapool_api.openai import ApiError, UnavailableError
from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.ledger.attempts import Attempts, payer
from lorapool_gateway.metrics import Metrics, RequestRecord
from lorapool_gateway.requests.attempt import Accepted, LoadTimeoutError, RuntimeClient
from lorapool_gateway.requests.hold import Held, Hold, displaced_error
from lorapool_gateway.requests.refusal import Passed, Refusal
from lorapool_gateway.requests.request import InferenceRequest
from lorapool_gateway.requests.wake import Waker
from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import RouteSource
from lorapool_gateway.routing.objects import AdapterRoute, BaseRoute
from lorapool_gateway.routing.outliers import Outliers
from lorapool_gateway.routing.pick import candidates, is_loaded
from lorapool_gateway.routing.routes import Entry, Pending, RouteTable, Target, start_refusal

NO_SLOT_ATTEMPTS = 3
"""The best replica and at most two more."""
LOST_RETRIES = 1
MIN_PATIENCE_S = 2.0
"""A request whose base became ready just before the deadline still has this long for its adapter's load."""
RECHECK_S = 2.0
"""A held request checks the table this often even if no change was published."""
PAUSE_S = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Pauses after all replicas refused. They grow, so that full runtimes are not overloaded with attempts."""
RETRY_AFTER_S = 5.0
LEFT = frozenset({Refusal.LOST, Refusal.SILENT})
"""The request was sent and the pod left without an answer."""


class Dispatcher:
    def __init__(
        self,
        routes: RouteSource,
        waker: Waker,
        runtimes: RuntimeClient,
        metrics: Metrics,
        keys: KeyGuard,
        attempts: Attempts | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._routes = routes
        self._waker = waker
        self._runtimes = runtimes
        self._metrics = metrics
        self._keys = keys
        self._attempts = attempts or Attempts()
        self._hold = Hold(metrics.hold)
        self._outliers = Outliers()
        routes.subscribe(runtimes.pods.follow)
        routes.subscribe(lambda table: self._hold.wake())
        self._clock = clock
        self._now_unix_s = now_unix_s

    async def dispatch(
        self, request: InferenceRequest, key: ApiKey, request_id: str, record: RequestRecord
    ) -> Accepted | Passed:
        """Raises ApiError when no replica could answer before the deadline."""
        rounds, lost, was_held = 0, 0, False
        held_s = 0.0
        left: set[str] = set()
        while True:
            table = self._routes.table
            key = self._keys.again(key)  # it may have been revoked while the request was held
            entry = table.find(request.model, key)
            record.names, record.project = _names(entry), payer(entry, key)
            resolved = table.check(entry, self._now_unix_s())
            base = resolved.base
            deadline_s = record.started_s + base.max_wait_s
            if isinstance(resolved, Pending):
                queue, late, pause_s = resolved.adapter.uid, resolved.late, 0.0
                if resolved.wake:
                    self._wake_if_down(table, resolved)
            else:
                record.identity = resolved.identity
                result = await self._try(table, resolved, request, key, request_id, deadline_s, record, left)
                if isinstance(result, Accepted | Passed):
                    self._note_answer(record, result, held_s if was_held else None)
                    return result
                lost += result is Refusal.LOST
                if lost > LOST_RETRIES:
                    raise _lost()
                if result in LEFT and self._has_other(base, left):
                    continue
                if result is None:
                    self._wake_if_down(table, resolved)
                queue, late = base.uid, _late(resolved, result)
                pause_s = 0.0 if result is None else _pause(rounds)
                rounds += 1
            waiting_since_s = self._clock()
            await self._wait(queue, request, table, resolved, late, record.started_s, pause_s, known=was_held)
            held_s += self._clock() - waiting_since_s
            was_held = True

    async def _try(
        self,
        table: RouteTable,
        target: Target,
        request: InferenceRequest,
        key: ApiKey,
        request_id: str,
        deadline_s: float,
        record: RequestRecord,
        left: set[str],
    ) -> Accepted | Passed | Refusal | None:
        """Tries the replicas in order. None: there is no usable replica. A Refusal is that of the last one.

        `left` are the uids of the pods that the request has left, and receives another one.
        """
        no_slot = 0
        last: Refusal | None = None
        ejected = self._outliers.ejected(self._clock()) | left
        for replica in candidates(target, table.replicas_of(target.base), self._runtimes.in_flight, ejected):
            attempt = self._attempts.open(target, replica, key, request_id, request.route, stream=request.stream)
            record.attempt = attempt
            record.attempts += 1
            try:
                result = await self._runtimes.attempt(
                    target,
                    replica,
                    request,
                    attempt,
                    lambda pod=replica.endpoint.pod_uid: self._still_loading(target, pod),  # type: ignore[misc]
                    max(MIN_PATIENCE_S, deadline_s - self._clock()),
                    record.used,
                )
            except LoadTimeoutError:
                raise UnavailableError(
                    f"`{target.identity}` was not loaded in time.",
                    param="model",
                    code="load_timeout",
                    retry_after_s=RETRY_AFTER_S,
                ) from None
            self._note_outcome(replica.endpoint.pod_uid, result)
            if isinstance(result, Passed):
                record.ended = AttemptEnd.REFUSED  # an error before the head of an answer: it was not admitted
            if isinstance(result, Accepted | Passed):
                return result
            record.close_attempt(AttemptEnd.LOST if result in LEFT else AttemptEnd.REFUSED)
            self._metrics.retry(str(target.base.ref), result)
            last = result
            if result in LEFT:
                left.add(replica.endpoint.pod_uid)
                return last  # the table may have changed meanwhile
            if result is Refusal.NO_SLOT:
                no_slot += 1
                if no_slot >= NO_SLOT_ATTEMPTS:
                    return last
        return last

    def _note_outcome(self, pod_uid: str, result: Accepted | Passed | Refusal) -> None:
        if isinstance(result, Refusal) and (result in LEFT or result is Refusal.CONNECT):
            self._outliers.failed(pod_uid, self._clock())
        else:
            self._outliers.answered(pod_uid)

    def _has_other(self, base: BaseRoute, left: set[str]) -> bool:
        """Whether the present table has a replica that answers and that the request has not left."""
        ejected = self._outliers.ejected(self._clock()) | left
        return any(
            replica.usable and not replica.poll_failed and replica.endpoint.pod_uid not in ejected
            for replica in self._routes.table.replicas_of(base)
        )

    def _still_loading(self, target: Target, pod_uid: str) -> bool:
        now = next(
            (item for item in self._routes.table.replicas_of(target.base) if item.endpoint.pod_uid == pod_uid), None
        )
        return now is not None and not is_loaded(target, now)

    def _wake_if_down(self, table: RouteTable, resolved: Target | Pending) -> None:
        """Raises UnavailableError while the base must not be started again after a failed start."""
        if not any(replica.usable for replica in table.replicas_of(resolved.base)):
            refused = start_refusal(resolved.base, self._now_unix_s())
            if refused is not None:
                raise refused
            self._waker.wake(resolved.base, self._hold.waiting(resolved.base.uid))

    async def _wait(
        self,
        queue: str,
        request: InferenceRequest,
        table: RouteTable,
        resolved: Target | Pending,
        late: ApiError,
        arrived_s: float,
        pause_s: float,
        *,
        known: bool,
    ) -> None:
        """Waits for a change of the table, but at most for `pause_s` where it is above 0.

        Raises `late` past the deadline, and TooManyRequestsError when the queue has no slot for the request.
        """
        base = resolved.base
        left_s = arrived_s + base.max_wait_s - self._clock()
        if left_s <= 0:
            raise late
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        held = Held(queue, request.tenant, arrived_s, lambda displaced: _end(waiter, displaced))
        with self._hold.slot(held, str(base.ref), base.max_queued, known=known):
            if pause_s <= 0 and self._routes.table is not table:
                return
            # A slot may become free without a change of the table.
            timer = loop.call_later(min(left_s, pause_s if pause_s > 0 else RECHECK_S), _end, waiter, False)
            try:
                displaced = await waiter
            finally:
                timer.cancel()
        if displaced:
            raise displaced_error(str(base.ref), base.max_queued)

    @staticmethod
    def _note_answer(record: RequestRecord, result: Accepted | Passed, held_s: float | None) -> None:
        load_ms = result.runtime_cold_ms if isinstance(result, Accepted) else None
        record.relaxed = result.relaxed if isinstance(result, Accepted) else None
        if held_s is not None or load_ms is not None:
            record.cold_ms = round((held_s or 0.0) * 1000) + (load_ms or 0)


def _end(waiter: asyncio.Future[bool], displaced: bool) -> None:
    if not waiter.done():
        waiter.set_result(displaced)


def _names(entry: Entry) -> tuple[str, str]:
    if isinstance(entry, AdapterRoute):
        return str(entry.base_ref), str(entry.ref)
    return str(entry.ref), BASE_TARGET


def _pause(rounds: int) -> float:
    return PAUSE_S[min(rounds, len(PAUSE_S) - 1)] * random.uniform(0.7, 1.3)


def _lost() -> ApiError:
    return UnavailableError(
        "The runtime was lost twice before it admitted the request.", code="upstream_lost", retry_after_s=RETRY_AFTER_S
    )


def _late(target: Target, refusal: Refusal | None) -> ApiError:
    base = target.base.ref
    match refusal:
        case Refusal.NO_SLOT:
            message, code = f"Every adapter slot of {base} is in use.", "no_slot"
        case Refusal.QUEUE_FULL:
            message, code = f"Every replica of {base} is full.", "queue_full"
        case _:
            message, code = f"No replica of {base} became ready in time.", "cold_start_timeout"
    return UnavailableError(message, code=code, retry_after_s=RETRY_AFTER_S)
