"""Delivers the outbox of each sink: in batches, at least once, with back-off, one sink never in the way of another."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from sqlalchemy import Connection, delete, select, update

from lorapool_ledger.metrics import Metrics
from lorapool_ledger.sinks.config import Sink, SinksError, parse_sinks
from lorapool_ledger.sinks.feeder import feed, waiting
from lorapool_ledger.sinks.shapes import MOST, Event, known_already, post_of
from lorapool_ledger.store.database import Database, DatabaseAwayError
from lorapool_ledger.store.tables import outbox

log = logging.getLogger("lorapool_ledger")

FILE = "sinks.yaml"
CHECK_S = 2.0
IDLE_S = 1.0
ANSWER_S = 10.0
"""A sink has this long to answer; then the same events are sent again."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 300.0
REFUSED_RETRY_S = 3600
"""An event that the sink refuses is tried again this much later, in case the sink was at fault."""
_WAIT_STATUS = frozenset({401, 403, 404, 405, 408, 409, 425, 429})
"""Answers that say nothing about the events: a missing right, a wrong address, or too many requests."""
MOST_ANSWER = 65536


@dataclass(frozen=True, slots=True)
class _Row:
    id: int
    event: Event


class SinkRefusal(Exception):
    """The sink refuses an event for what it is."""


class SinkAway(Exception):
    """The sink does not take anything at present. `retry_s` is what it asks for."""

    def __init__(self, message: str, retry_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class SinkSender:
    """One sink: fills its outbox and delivers it."""

    def __init__(
        self,
        sink: Sink,
        database: Database,
        session: aiohttp.ClientSession,
        secrets: Path,
        metrics: Metrics,
        *,
        now_unix_s: Callable[[], float] = time.time,
        answer_s: float = ANSWER_S,
        first_retry_s: float = FIRST_RETRY_S,
    ) -> None:
        self._sink = sink
        self._database = database
        self._session = session
        self._secrets = secrets
        self._metrics = metrics
        self._now_unix_s = now_unix_s
        self._answer_s = answer_s
        self._first_retry_s = first_retry_s

    async def run(self) -> None:
        """Works for ever."""
        retry_s = self._first_retry_s
        while True:
            pause_s = IDLE_S
            try:
                if await self.step():
                    pause_s = 0.0
                retry_s = self._first_retry_s
            except (SinkAway, DatabaseAwayError) as error:
                log.warning("sink %s: %s; tried again", self._sink.name, error)
                asked_s = error.retry_s if isinstance(error, SinkAway) else 0.0
                pause_s = max(asked_s, retry_s * random.uniform(0.5, 1.0))
                retry_s = min(retry_s * 2, LONGEST_RETRY_S)
            await asyncio.sleep(min(pause_s, LONGEST_RETRY_S))

    async def step(self) -> bool:
        """Takes new facts in and delivers one batch. Returns whether there may be more. Raises SinkAway."""
        now_s = self._now_unix_s()
        passed = await self._database.write(lambda connection: feed(connection, self._sink, int(now_s * 1000)))
        rows = await self._database.read(lambda connection: _due(connection, self._sink, int(now_s)))
        if rows:
            await self._deliver(rows)
        self._metrics.outbox(self._sink.name, *await self._database.read(lambda c: waiting(c, self._sink)))
        return bool(rows or passed)

    async def _deliver(self, rows: Sequence[_Row]) -> None:
        try:
            known = await self._post([row.event for row in rows])
        except SinkRefusal as error:
            if len(rows) > 1:  # one of them may be at fault for all
                for row in rows:
                    await self._deliver([row])
                return
            log.error("sink %s refuses an event: %s", self._sink.name, error)
            self._metrics.delivered(self._sink.name, "refused", 1)
            await self._put_off([row.id for row in rows], f"refused: {error}", REFUSED_RETRY_S)
            return
        except SinkAway as error:
            self._metrics.delivered(self._sink.name, "failed", len(rows))
            await self._put_off([row.id for row in rows], str(error), 0)
            raise
        if known is not None:  # refused as a whole for those that the sink has: the others are not taken yet
            taken, others = (
                [r for n, r in enumerate(rows) if n in known],
                [r for n, r in enumerate(rows) if n not in known],
            )
            await self._remove([row.id for row in taken])
            if others:
                await self._deliver(others)
            return
        self._metrics.delivered(self._sink.name, "delivered", len(rows))
        await self._remove([row.id for row in rows])

    async def _post(self, events: Sequence[Event]) -> frozenset[int] | None:
        """None: all are taken. Else the places of those that the sink had. Raises SinkRefusal, SinkAway."""
        request = post_of(self._sink, events, self._token())
        try:
            async with self._session.post(
                self._sink.url,
                data=request.data,
                headers=request.headers,
                timeout=aiohttp.ClientTimeout(total=self._answer_s),
                allow_redirects=False,
            ) as response:
                if 200 <= response.status < 300:
                    return None  # whatever the body is, and whether it arrives
                answer = (await response.content.read(MOST_ANSWER)).decode(errors="replace")
                status, asked = response.status, response.headers.get("Retry-After", "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SinkAway(f"no answer ({type(error).__name__})") from None
        if known := known_already(self._sink, status, answer, len(events)):
            return known
        if status >= 500 or status < 400 or status in _WAIT_STATUS:
            raise SinkAway(f"answered {status}", float(asked) if asked.isdigit() else 0.0)
        raise SinkRefusal(f"{status} {' '.join(answer.split())[:300]}")

    def _token(self) -> str:
        if not self._sink.token_key:
            return ""
        try:
            return (self._secrets / self._sink.token_key).read_text().strip()
        except OSError:
            raise SinkAway(
                f"its token {self._sink.token_key} is not in the Secret of ledger.sinks.existingSecret"
            ) from None

    async def _remove(self, ids: Sequence[int]) -> None:
        await self._database.write(lambda connection: connection.execute(delete(outbox).where(outbox.c.id.in_(ids))))

    async def _put_off(self, ids: Sequence[int], error: str, later_s: int) -> None:
        values = {"tries": outbox.c.tries + 1, "error": error[:1000], "next_unix_s": int(self._now_unix_s()) + later_s}
        statement = update(outbox).where(outbox.c.id.in_(ids)).values(values)
        await self._database.write(lambda connection: connection.execute(statement))


def _due(connection: Connection, sink: Sink, now_s: int) -> list[_Row]:
    query = (
        select(outbox.c.id, outbox.c.event_id, outbox.c.body)
        .where(outbox.c.sink == sink.name, outbox.c.next_unix_s <= now_s)
        .order_by(outbox.c.id)
        .limit(MOST[sink.type])
    )
    return [_Row(number, Event(event_id, body)) for number, event_id, body in connection.execute(query)]


class Sinks:
    """Follows the list of sinks, and runs a sender for each. A list with a mistake changes nothing."""

    def __init__(
        self, database: Database, folder: Path, secrets: Path, session: aiohttp.ClientSession, metrics: Metrics
    ) -> None:
        self._database = database
        self._file = folder / FILE
        self._secrets = secrets
        self._session = session
        self._metrics = metrics
        self._text: str | None = None
        self._senders: dict[Sink, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Looks at the list for ever. Cancelling it stops all senders."""
        try:
            while True:
                self._follow()
                await asyncio.sleep(CHECK_S)
        finally:
            for task in self._senders.values():
                task.cancel()
            await asyncio.gather(*self._senders.values(), return_exceptions=True)
            self._senders.clear()

    def _follow(self) -> None:
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError):
            return
        if text == self._text:
            return
        self._text = text
        try:
            listed = parse_sinks(text)
        except SinksError as error:
            log.error("the list of sinks is refused, the ones before go on: %s", "; ".join(error.lines))
            self._metrics.configuration_refused("sinks", True)
            return
        self._metrics.configuration_refused("sinks", False)
        for sink in [sink for sink in self._senders if sink not in listed]:
            self._senders.pop(sink).cancel()
        for sink in listed:
            if sink not in self._senders:
                sender = SinkSender(sink, self._database, self._session, self._secrets, self._metrics)
                self._senders[sink] = asyncio.create_task(sender.run(), name=f"sink {sink.name}")
