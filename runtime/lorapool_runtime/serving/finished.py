"""The requests that ended lately, with what each has used: what a gateway or a ledger asks for after a lost connection.

They are kept for at least KEEP_S, unless more than KEEP_REQUESTS end in that time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import FinishedRequest, FinishedRequests, RequestOutcome, Usage
from lorapool_runtime.clock import Clock
from lorapool_runtime.serving.caller import Caller

KEEP_S = 900.0
KEEP_REQUESTS = 100_000
"""About 60 MB."""
PAGE = 1000
"""Requests of one answer."""


@dataclass(frozen=True, slots=True)
class _Finished:
    seq: int
    caller: Caller
    key: AdapterKey | None
    outcome: RequestOutcome
    usage: Usage
    ended_s: float
    ended_unix_s: float

    def report(self) -> FinishedRequest:
        return FinishedRequest(
            seq=self.seq,
            request_id=self.caller.request_id,
            attempt=self.caller.attempt,
            uid=None if self.key is None else self.key.uid,
            digest=None if self.key is None else self.key.digest,
            prompt_tokens=self.usage.prompt_tokens,
            cached_tokens=self.usage.cached_tokens,
            completion_tokens=self.usage.completion_tokens,
            outcome=self.outcome,
            ended_unix_s=self.ended_unix_s,
        )


class FinishedRing:
    def __init__(self, boot_id: str, clock: Clock) -> None:
        self._boot_id = boot_id
        self._clock = clock
        self._kept: deque[_Finished] = deque()
        self._by_attempt: dict[str, _Finished] = {}
        self.last_seq = 0
        """Number of the last request."""

    def add(self, caller: Caller, key: AdapterKey | None, outcome: RequestOutcome, usage: Usage) -> None:
        self.last_seq += 1
        now_s = self._clock.now_s()
        finished = _Finished(self.last_seq, caller, key, outcome, usage, now_s, self._clock.unix_s())
        self._kept.append(finished)
        self._by_attempt[caller.attempt] = finished
        while len(self._kept) > KEEP_REQUESTS or self._kept[0].ended_s < now_s - KEEP_S:
            self._forget(self._kept.popleft())

    def usage_of(self, attempt: str) -> Usage | None:
        """The final usage of an attempt; None if it is not among those kept."""
        found = self._by_attempt.get(attempt)
        return None if found is None else found.usage

    def after(self, seq: int) -> FinishedRequests:
        """The first requests numbered above `seq`."""
        first = self._kept[0].seq if self._kept else self.last_seq + 1
        skip = max(0, seq + 1 - first)
        page = [finished.report() for finished in islice(self._kept, skip, skip + PAGE)]
        last = page[-1].seq if page else max(seq, first - 1)
        return FinishedRequests(boot_id=self._boot_id, first_seq=first, last_seq=last, requests=page)

    def _forget(self, finished: _Finished) -> None:
        if self._by_attempt.get(finished.caller.attempt) is finished:
            del self._by_attempt[finished.caller.attempt]
