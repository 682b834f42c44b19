"""From a parsed request to an accepted answer: resolve, wake, hold, pick, attempt, again until the deadline.

Called by app. A request is pinned anew each time round, and only while nothing was accepted, so an answer is
wholly one digest's. Retries happen before an answer's head only; a request whose runtime died before that
is sent again once. Every wait is bounded and ends when the client leaves.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from lorapool_api.common import BASE_TARGET
from lorapool_api.openai import ApiError, Unavailable
from lorapool_gateway.auth import ApiKey
from lorapool_gateway.forward import Accepted, Forwarder, Passed, Refusal, TooLate
from lorapool_gateway.hold import Hold
from lorapool_gateway.metrics import Metrics, RequestRecord
from lorapool_gateway.objects import AdapterRoute
from lorapool_gateway.pick import candidates, is_loaded
from lorapool_gateway.request import InferenceRequest
from lorapool_gateway.routes import Entry, Pending, RouteTable, Target
from lorapool_gateway.store import RouteSource
from lorapool_gateway.wake import Waker

NO_SLOT_ATTEMPTS = 3
"""The best replica and at most two more."""
LOST_RETRIES = 1
MIN_PATIENCE_S = 2.0
"""A request whose base came up at the last moment still gets this long for its adapter's load."""
RECHECK_S = 2.0
"""A held request looks again this often even when no change was announced."""
PAUSE_S = (0.05, 0.1, 0.2, 0.4, 0.8)
"""After replicas refused: pauses that grow, so that a full runtime is not hammered."""
RETRY_AFTER_S = 5.0


class Dispatcher:
    def __init__(
        self,
        routes: RouteSource,
        waker: Waker,
        forwarder: Forwarder,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._routes = routes
        self._waker = waker
        self._forwarder = forwarder
        self._metrics = metrics
        self._hold = Hold(metrics.hold)
        self._clock = clock
        self._now_unix_s = now_unix_s

    async def dispatch(
        self, request: InferenceRequest, key: ApiKey, request_id: str, record: RequestRecord
    ) -> Accepted | Passed:
        """Raises ApiError when nothing could answer."""
        rounds, lost, was_held = 0, 0, False
        held_s = 0.0
        while True:
            table = self._routes.table
            entry = table.find(request.model, key)
            record.names = _names(entry)
            resolved = table.judge(entry, self._now_unix_s())
            base = resolved.base
            deadline_s = record.started_s + base.max_wait_s
            if isinstance(resolved, Pending):
                line, late, pause_s = resolved.adapter.uid, resolved.late, 0.0
                if resolved.wake:
                    self._wake_if_down(table, resolved)
            else:
                record.identity = resolved.identity
                result = await self._try(table, resolved, request, request_id, deadline_s)
                if isinstance(result, Accepted | Passed):
                    self._note_cold(record, result, held_s if was_held else None)
                    return result
                if result is Refusal.LOST:
                    lost += 1
                    if lost > LOST_RETRIES:
                        raise _lost()
                if result is None:
                    self._wake_if_down(table, resolved)
                line, late = base.uid, _late(resolved, result)
                pause_s = 0.0 if result is None else _pause(rounds)
                rounds += 1
            waiting_since_s = self._clock()
            await self._wait(line, table, resolved, late, deadline_s, pause_s, known=was_held)
            held_s += self._clock() - waiting_since_s
            was_held = True

    async def _try(
        self, table: RouteTable, target: Target, request: InferenceRequest, request_id: str, deadline_s: float
    ) -> Accepted | Passed | Refusal | None:
        """One pass over the replicas. None: there is none; a Refusal: the last one's."""
        no_slot = 0
        last: Refusal | None = None
        for replica in candidates(target, table.replicas_of(target.base), self._forwarder.in_flight):
            try:
                result = await self._forwarder.attempt(
                    target,
                    replica,
                    request,
                    request_id,
                    lambda pod=replica.endpoint.pod_uid: self._still_loading(target, pod),  # type: ignore[misc]
                    max(MIN_PATIENCE_S, deadline_s - self._clock()),
                )
            except TooLate:
                raise Unavailable(
                    f"`{target.identity}` was not loaded in time.",
                    param="model",
                    code="load_timeout",
                    retry_after_s=RETRY_AFTER_S,
                ) from None
            if isinstance(result, Accepted | Passed):
                return result
            self._metrics.retry(str(target.base.ref), result)
            last = result
            if result is Refusal.LOST:
                return last  # perhaps begun: dispatch decides whether to send it again
            if result is Refusal.NO_SLOT:
                no_slot += 1
                if no_slot >= NO_SLOT_ATTEMPTS:
                    return last
        return last

    def _still_loading(self, target: Target, pod_uid: str) -> bool:
        now = next(
            (item for item in self._routes.table.replicas_of(target.base) if item.endpoint.pod_uid == pod_uid), None
        )
        return now is not None and not is_loaded(target, now)

    def _wake_if_down(self, table: RouteTable, resolved: Target | Pending) -> None:
        if not any(replica.usable for replica in table.replicas_of(resolved.base)):
            self._waker.wake(resolved.base)

    async def _wait(
        self,
        line: str,
        table: RouteTable,
        resolved: Target | Pending,
        late: ApiError,
        deadline_s: float,
        pause_s: float,
        *,
        known: bool,
    ) -> None:
        left_s = deadline_s - self._clock()
        if left_s <= 0:
            raise late
        base = resolved.base
        with self._hold.place(line, str(base.ref), base.max_queued, known=known):
            if pause_s > 0:
                # The table need not change for a slot or a queue place to come free.
                await self._routes.changed(self._routes.table, min(left_s, pause_s))
            else:
                await self._routes.changed(table, min(left_s, RECHECK_S))

    @staticmethod
    def _note_cold(record: RequestRecord, result: Accepted | Passed, held_s: float | None) -> None:
        load_ms = result.runtime_cold_ms if isinstance(result, Accepted) else None
        if held_s is not None or load_ms is not None:
            record.cold_ms = round((held_s or 0.0) * 1000) + (load_ms or 0)


def _names(entry: Entry) -> tuple[str, str]:
    if isinstance(entry, AdapterRoute):
        return str(entry.base_ref), str(entry.ref)
    return str(entry.ref), BASE_TARGET


def _pause(rounds: int) -> float:
    return PAUSE_S[min(rounds, len(PAUSE_S) - 1)] * random.uniform(0.7, 1.3)


def _lost() -> ApiError:
    return Unavailable(
        "The runtime was lost twice before it began to answer.", code="upstream_lost", retry_after_s=RETRY_AFTER_S
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
    return Unavailable(message, code=code, retry_after_s=RETRY_AFTER_S)
