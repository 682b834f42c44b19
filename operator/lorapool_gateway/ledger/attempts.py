"""Attempts as the ledger counts them: each is opened before it is sent to a runtime, and closed once.

The records of one turn of the event loop are written together, by `Attempts.write`: if each was written by itself, the
processor would fetch the code for it into its caches each time, which takes longer than to run it. The HTTP client
calls `write` before it sends requests, so that no runtime ever knows an attempt that the journal does not. A process
that is killed loses the ends of its last turn, never a beginning that was sent.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lorapool_api.openai import CODE_DRAINING, ApiError
from lorapool_api.protocol import INFERENCE_ROUTES, Usage
from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.ledger.attempt_ids import AttemptIds
from lorapool_gateway.ledger.journal import Journal
from lorapool_gateway.ledger.records import Closed, Opened, Parties, Record, Refusals, encode_parties
from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.routing.objects import AdapterRoute
from lorapool_gateway.routing.routes import Entry, RuntimeReplica, Target

COUNT_MAX = 2**53
"""No request has as many tokens; a runtime that reports more is not believed. A power of two."""
FLUSH_S = 5.0
KNOWN_MOST = 2048
REFUSAL_ROWS = 10_000
"""Rows of one minute; refusals beyond are counted without their key."""

_ENDS = {
    "upstream_lost": AttemptEnd.LOST,
    "wrong_adapter": AttemptEnd.WITHHELD,
    "upstream_timeout": AttemptEnd.TIMEOUT,
    "load_timeout": AttemptEnd.TIMEOUT,
    "deadline_exceeded": AttemptEnd.TIMEOUT,
    CODE_DRAINING: AttemptEnd.TIMEOUT,
}
"""By the code of the client's error. The gateway itself ends requests at their deadline and when it stops."""


def end_of(error: ApiError) -> AttemptEnd:
    """How an attempt ended whose client receives this error of the gateway."""
    return _ENDS.get(error.code or "", AttemptEnd.FAILED)


def payer(entry: Entry, key: ApiKey) -> str:
    """The namespace that pays: the adapter's; for a base the key's default one, or its only one, or else the base's."""
    if isinstance(entry, AdapterRoute):
        return entry.ref.namespace
    if key.default_namespace is not None:
        return key.default_namespace
    if key.namespaces is not None and len(key.namespaces) == 1:
        return next(iter(key.namespaces))
    return entry.ref.namespace


@dataclass(slots=True)
class Attempt:
    """One request on its way to one runtime."""

    id: str
    request_id: str
    key_uid: str
    project: str
    _attempts: Attempts | None
    """None: there is nothing to record, or no more."""

    def close(self, outcome: AttemptEnd, code: int, usage: Usage | None, cold_ms: int | None) -> None:
        """Records the end. Later calls do nothing."""
        attempts, self._attempts = self._attempts, None
        if attempts is None:
            return
        prompt = cached = completion = None
        if usage is not None:
            prompt, cached, completion = usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
            if not 0 <= prompt | cached | completion < COUNT_MAX:  # true if it is true of each
                prompt = cached = completion = None
        now_ms = time.time_ns() // 1_000_000
        attempts._write_soon(Closed(0, self.id, outcome, now_ms, code, prompt, cached, completion, cold_ms))


class Attempts:
    """Opens attempts and counts refusals, in the journal if there is one."""

    def __init__(self, journal: Journal | None = None, *, now_unix_s: Callable[[], float] = time.time) -> None:
        self._journal = journal
        self._ids = AttemptIds()
        self._now_unix_s = now_unix_s
        self._known: dict[tuple[object, ...], tuple[str, int, tuple[object, ...]]] = {}
        """Who pays, and the number of the parties, of all requests with these objects."""
        self._parties: dict[int, bytes] = {}
        """Encoded, by the numbers that records refer to them by."""
        self._numbers: dict[bytes, int] = {}
        self._next_number = itertools.count(1)
        self._unwritten: list[Record] = []
        self._given_up: set[str] = set()
        """Attempts whose beginning is not in the journal, until they end."""
        self._minute = 0
        self._refusals: Counter[tuple[str, str, str]] = Counter()

    def open(
        self, target: Target, replica: RuntimeReplica, key: ApiKey, request_id: str, route: str, *, stream: bool
    ) -> Attempt:
        """Records that a request is about to be sent. What generates nothing is not recorded."""
        entry: Entry = target.adapter or target.base
        now_ms = time.time_ns() // 1_000_000
        if self._journal is None or route not in INFERENCE_ROUTES:
            return Attempt(self._ids.next(now_ms), request_id, key.uid, payer(entry, key), None)
        names = (id(entry), id(replica), id(key), route, stream)
        known = self._known.get(names)
        if known is None:
            parties = _parties(target, entry, replica, key, route, stream=stream)
            # The objects are kept with it, so that no other object gets one of their ids.
            known = self._known[names] = (parties.project, self._number(parties), (entry, replica, key))
        project, number, _ = known
        attempt = Attempt(self._ids.next(now_ms), request_id, key.uid, project, self)
        self._write_soon(Opened(0, attempt.id, request_id, number, now_ms))
        return attempt

    def write(self) -> None:
        """Writes to the journal what is not written yet."""
        if not self._unwritten or self._journal is None:
            return
        records, self._unwritten = self._unwritten, []
        if self._given_up:  # an end without a beginning says nothing
            records = [record for record in records if not self._is_given_up(record)]
        if lost := self._journal.write(records, self._parties):
            ended = {record.attempt for record in records if isinstance(record, Closed)}
            self._given_up |= {record.attempt for record in lost if isinstance(record, Opened)} - ended
        if len(self._known) > KNOWN_MOST:
            self._known.clear()
            self._parties.clear()
            self._numbers.clear()

    def _write_soon(self, record: Record) -> None:
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self.write)
        self._unwritten.append(record)

    def _is_given_up(self, record: Record) -> bool:
        if not isinstance(record, Closed) or record.attempt not in self._given_up:
            return False
        self._given_up.remove(record.attempt)
        return True

    def _number(self, parties: Parties) -> int:
        encoded = encode_parties(parties)
        number = self._numbers.get(encoded)
        if number is None:
            number = self._numbers[encoded] = next(self._next_number)
            self._parties[number] = encoded
        return number

    def refused(self, key_uid: str, project: str, code: str) -> None:
        """Counts a request that was refused before any attempt."""
        if self._journal is None:
            return
        self._flush_before(int(self._now_unix_s()) // 60 * 60)
        row = (key_uid, project, code[:64])
        self._refusals[row if row in self._refusals or len(self._refusals) < REFUSAL_ROWS else ("", "", code[:64])] += 1

    async def keep_flushed(self) -> None:
        """Writes the refusals of each minute after its end, until cancelled; then those of the present one."""
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                self._flush_before(int(self._now_unix_s()) // 60 * 60)
        finally:
            self._flush_before(self._minute + 60)

    def _flush_before(self, minute: int) -> None:
        if self._journal is not None and self._minute < minute:
            for (key_uid, project, code), count in self._refusals.items():
                self._journal.append(Refusals(0, self._minute, key_uid, project, code, count))
            self._refusals.clear()
            self._minute = minute


def _parties(target: Target, entry: Entry, replica: RuntimeReplica, key: ApiKey, route: str, stream: bool) -> Parties:
    return Parties(
        key_uid=key.uid,
        key=key.id,
        owner=key.owner,
        project=payer(entry, key),
        model=str(entry.ref),
        uid=target.adapter.uid if target.adapter is not None else "",
        digest=(target.digest or "")[:128],
        base_uid=target.base.uid,
        base=str(target.base.ref),
        pod_uid=replica.endpoint.pod_uid,
        boot_id=replica.state.boot_id[:64] if replica.state is not None else "",
        route=route,
        stream=stream,
    )
