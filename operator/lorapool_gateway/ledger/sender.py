"""Sends the journal to the ledger, and the journals of earlier processes of the pod. Nothing waits for it.

A batch is sent again until the ledger says that it has committed it. While the ledger is away, the pauses grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable

import aiohttp

from lorapool_api.usage_protocol import LEDGER_SERVER_NAME, PAGE_RECORDS, ROUTE_ATTEMPTS, BatchAnswer
from lorapool_gateway.ledger import segments
from lorapool_gateway.ledger.journal import Journal, predecessors
from lorapool_gateway.ledger.records import by_number
from lorapool_gateway.ledger.segments import Chunk, Reader

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
BATCH_BYTES = 1024 * 1024
PAUSE_S, PAUSE_MAX_S = 0.5, 30.0
"""The pause after a failure is a random part of twice the one before, at most PAUSE_MAX_S."""
TIMEOUT_S = 30.0
LAST_SEND_S = 5.0
"""For what is unsent when the process stops."""


class LedgerError(Exception):
    """The ledger cannot be reached, or does not take the batch."""


class LedgerClient:
    """The release's ledger, as the gateway calls it."""

    def __init__(
        self, url: str, tokens: Callable[[], tuple[str, ...]], tls: Callable[[], object], *, limit: int = 64
    ) -> None:
        """`tokens()` are the bearer tokens in the order in which to try them; `tls()` is the context for https."""
        self.url = url.rstrip("/")
        self._tokens = tokens
        self._tls = tls
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=limit),
            headers={"Accept-Encoding": "identity", "User-Agent": "lorapool-gateway"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    def call(
        self, method: str, path: str, headers: dict[str, str], *, silence_s: float, data: bytes | None = None
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """One call. May raise aiohttp.ClientError, TimeoutError and OSError."""
        secure = self.url.startswith("https:")
        return self._session.request(
            method,
            self.url + path,
            headers=headers,
            data=data,
            ssl=self._tls() if secure else False,  # type: ignore[arg-type]
            server_hostname=LEDGER_SERVER_NAME if secure else None,
            timeout=aiohttp.ClientTimeout(sock_connect=2.0, sock_read=silence_s, total=None),
            allow_redirects=False,
        )

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> tuple[int, bytes]:
        """Posts JSON with the gateway's token; returns status and body. Raises LedgerError when there is no answer."""
        status, answer = 401, b""
        try:
            async with asyncio.timeout(timeout_s):
                for token in self._tokens():
                    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                    async with self.call("POST", path, headers, silence_s=timeout_s, data=body) as response:
                        status, answer = response.status, await response.read()
                    if status != 401:
                        break
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise LedgerError(repr(error)[:200]) from error
        return status, answer


class Sender:
    def __init__(
        self,
        client: LedgerClient,
        journal: Journal,
        failed: Callable[[], None] = lambda: None,
        damaged: Callable[[str], None] = lambda why: None,
        *,
        interval_s: float = INTERVAL_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        """`failed()` is called for each batch that was not taken, `damaged(why)` for each line that cannot be read."""
        self._client = client
        self._journal = journal
        self._failed = failed
        self._damaged = damaged
        self._interval_s = interval_s
        self._pause_s = pause_s
        self._stopping = asyncio.Event()
        self._reader = Reader(journal.folder)
        self._failures = 0
        self.older = 0
        """Journals of earlier processes that are not sent yet."""

    async def run(self) -> None:
        """Sends until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_own(), name="send the journal")
            group.create_task(self._run_older(), name="send older journals")

    async def send_last(self) -> None:
        """Sends what is left, and that nothing follows. Gives up after some seconds; a successor then sends it."""
        with contextlib.suppress(LedgerError, TimeoutError):
            async with asyncio.timeout(LAST_SEND_S):
                await self._send_all(self._reader, self._journal, ended=True)
                self._journal.ended()

    async def _run_own(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._journal.written.wait()
            self._journal.written.clear()
            if self._journal.unsent:
                await self._retried(lambda: self._send_all(self._reader, self._journal, ended=False))

    async def _run_older(self) -> None:
        found = predecessors(self._journal.folder.parent, self._journal.boot_id)
        self.older = len(found)
        for folder, held in found:
            size = sum(path.stat().st_size for path in segments.segments(folder))
            try:
                reader = Reader(folder, after=segments.through_of(folder))
                await self._retried(lambda reader=reader: self._send_all(reader, None, ended=True))  # type: ignore[misc]
                segments.forget(folder)
                self._journal.others = max(0, self._journal.others - size)
            finally:
                os.close(held)
            self.older -= 1
        if found:
            log.info("sent the journals of earlier processes of this pod")

    async def _retried(self, send: Callable[[], object]) -> None:
        """Repeats until it succeeds."""
        failures = 0
        while True:
            try:
                await send()  # type: ignore[misc]
            except (LedgerError, OSError) as error:
                self._failed()
                if failures == 0:
                    log.warning("the ledger does not take records; they are kept", extra={"error": str(error)[:300]})
                await asyncio.sleep(random.uniform(0.1, 1.0) * min(PAUSE_MAX_S, self._pause_s * 2 ** min(failures, 16)))
                failures += 1
            else:
                if failures:
                    log.info("the ledger takes records again")
                return

    async def _send_all(self, reader: Reader, journal: Journal | None, *, ended: bool) -> None:
        """Sends until nothing is left. Raises LedgerError; the next call continues with what was not committed."""
        while True:
            until = None if journal is None else journal.seq
            if reader.pending is None and (until is None or reader.after < until):
                reader.pending = None if journal is None else journal.recent(reader.after, PAGE_RECORDS)
                if reader.pending is not None:
                    reader.after = reader.pending.last
                else:
                    reader.pending = await asyncio.to_thread(reader.read, until, BATCH_BYTES, PAGE_RECORDS)
                    self._note_damage(reader)
            chunk = reader.pending or Chunk()
            if not chunk.bodies and not ended:
                reader.pending = None
                return
            through = await self._send(reader.folder.name, chunk, ended=ended and not chunk.bodies)
            reader.pending = None
            if journal is not None:
                journal.cut(through)
            if not chunk.bodies:
                return
            if through != chunk.last:
                reader.seek(through)
            elif journal is not None and not ended and journal.seq - through < PAGE_RECORDS:
                return  # the rest goes with the next full batch, or after the interval

    async def _send(self, boot_id: str, chunk: Chunk, *, ended: bool) -> int:
        """Sends one batch; returns up to which number the ledger has this process's records."""
        records = b",".join(chunk.bodies)
        body = (
            b'{"bootId":"%b","gateway":"%b","ended":%b,"lostBefore":%d,"nowUnixMs":%d,"parties":%b,"records":[%b]}'
            % (
                boot_id.encode(),
                socket.gethostname()[:253].encode(),
                b"true" if ended else b"false",
                chunk.lost_before,
                time.time_ns() // 1_000_000,
                by_number(chunk.parties),
                records,
            )
        )
        status, answer = await self._client.post(ROUTE_ATTEMPTS, body, timeout_s=TIMEOUT_S)
        if status not in (200, 409):
            raise LedgerError(f"the ledger answers {status}: {answer[:200].decode(errors='replace')}")
        try:
            through = BatchAnswer.model_validate_json(answer).through
        except ValueError:
            raise LedgerError("the ledger's answer is not of the protocol") from None
        if through < chunk.last and (status == 200 or chunk.lost_before or through + 1 == chunk.first):
            raise LedgerError(f"the ledger has records up to {through} and does not take {chunk.first}")
        return through

    def _note_damage(self, reader: Reader) -> None:
        for why in ("damaged", "torn"):
            for _ in range(getattr(reader, why)):
                self._damaged(why)
            if count := getattr(reader, why):
                log.error("lines of the journal cannot be read; they are kept aside", extra={"error": f"{count} {why}"})
                setattr(reader, why, 0)
