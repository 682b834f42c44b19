"""Pulls the records of every runtime pod: `GET /v1/usage`, one transaction, then `DELETE` as the acknowledgement.

A pod is pulled from the moment it has proved itself until it is gone from the cluster. Its processes that have not
ended by then end with their last sign of life.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
from sqlalchemy import Connection, select

from lorapool_api.pod_address import server_name
from lorapool_api.trust.tls import HANDSHAKE_TIMEOUT_S, ReleaseTrust
from lorapool_api.usage_protocol import PAGE_RECORDS, ROUTE_USAGE, BootState, UsagePage
from lorapool_ledger.intake.runtime_page import PageError, PageTaken, Pod, close_gone, cursors, take
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.store.database import Database
from lorapool_ledger.store.tables import boot

log = logging.getLogger("lorapool_ledger")

WAIT_S = 5.0
"""A runtime without news answers after this long."""
ANSWER_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 2.0
INTERVAL_S = 0.5
"""Pause between two pages of a process whose records were all read, so that a commit carries many records."""
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
QUIET_WRITE_S = 30.0
"""A process without new records has its sign of life written this often."""
PAGE_MOST_BYTES = 2**28
"""Of a response: what a runtime keeps by default. A page of one whose disk fails may have all of that."""
GONE_AFTER_S = 60.0
"""A pod that is absent from the cluster for this long is gone."""


@dataclass(frozen=True, slots=True)
class PulledPod:
    pod: Pod
    url: str


class Pulls:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        database: Database,
        tokens: Callable[[str], tuple[str, ...]],
        trust: ReleaseTrust,
        metrics: Metrics,
        *,
        now_s: Callable[[], float] = time.time,
        gone_after_s: float = GONE_AFTER_S,
    ) -> None:
        """`tokens(base_uid)` are the bearer tokens of a base's runtimes, in the order in which to try them."""
        self._session = session
        self._database = database
        self._tokens = tokens
        self._trust = trust
        self._metrics = metrics
        self._now_s = now_s
        self._gone_after_s = gone_after_s
        self._tasks: dict[str, tuple[PulledPod, asyncio.Task[None]]] = {}
        self._answered_s: dict[str, float] = {}
        self._absent_s: dict[str, float] = {}
        """Since when pods of which processes have not ended are absent, in monotonic time."""

    @property
    def oldest_answer_s(self) -> float:
        """Age in seconds of the last answer of the pod that has not answered for longest; 0 without pods."""
        now_s = time.monotonic()
        return max((now_s - self._answered_s[uid] for uid in self._tasks if uid in self._answered_s), default=0.0)

    def follow(self, pods: Mapping[str, PulledPod]) -> None:
        """Pulls exactly these pods, by pod uid, from now on."""
        for uid, (pulled, task) in list(self._tasks.items()):
            if pods.get(uid) != pulled:
                task.cancel()
                del self._tasks[uid]
        for uid, pulled in pods.items():
            if uid not in self._tasks:
                self._answered_s.setdefault(uid, time.monotonic())
                task = asyncio.create_task(self._pull(pulled), name=f"pull {pulled.url}")
                self._tasks[uid] = (pulled, task)

    async def close(self) -> None:
        """Ends all pulls. A page that is being committed may still be."""
        tasks = [task for _, task in self._tasks.values()]
        self.follow({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close_gone(self, present: frozenset[str]) -> int:
        """Ends the processes of pods that are absent for long. `present`: uids of all runtime pods of the cluster."""
        rows = await self._database.read(_open_boots)
        now_s, gone = time.monotonic(), []
        self._absent_s = {uid: since for uid, since in self._absent_s.items() if uid not in present}
        for boot_id, pod_uid in rows:
            if pod_uid not in present and now_s - self._absent_s.setdefault(pod_uid, now_s) >= self._gone_after_s:
                gone.append(boot_id)
        if not gone:
            return 0
        closed = await self._database.write(lambda connection: close_gone(connection, gone, int(self._now_s())))
        for uid in {uid for boot_id, uid in rows if boot_id in set(gone)}:
            self._absent_s.pop(uid, None)
            self._answered_s.pop(uid, None)
        log.warning("runtime pods are gone with records that were not read", extra={"error": f"{closed} processes"})
        return closed

    async def _pull(self, pulled: PulledPod) -> None:
        failures = 0
        while True:
            try:
                await _PodPull(self, pulled).run()
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                if failures == 0:
                    self._report(pulled, error)
            except Exception as error:  # of any type: what was not committed is delivered again
                self._metrics.intake_failed("runtime")
                log.error(
                    "a runtime's records were not committed; they are read again",
                    extra={"replica": pulled.pod.name, "base": pulled.pod.base, "error": repr(error)[:300]},
                )
            else:
                failures = -1
            await asyncio.sleep(BACKOFF_S[max(0, min(failures, len(BACKOFF_S) - 1))] * random.uniform(0.7, 1.3))
            failures += 1

    def _report(self, pulled: PulledPod, error: Exception) -> None:
        where = {"base": pulled.pod.base, "replica": pulled.pod.name}
        if refusal := self._trust.refusal(error):
            log.error("runtime is not trusted", extra={**where, "error": refusal})
        elif isinstance(error, PageError):
            self._metrics.intake_failed("runtime")
            log.error("runtime's records are refused", extra={**where, "error": str(error)})
        else:
            log.info("runtime's records cannot be read", extra={**where, "error": repr(error)[:200]})

    async def get(self, pulled: PulledPod, boot_id: str, after: int, wait_s: float) -> UsagePage:
        """Raises aiohttp.ClientError, OSError, TimeoutError, ValueError."""
        params = {"after": str(after), "wait": str(wait_s), **({"boot": boot_id} if boot_id else {})}
        body = await self._call("GET", pulled, params, wait_s + ANSWER_TIMEOUT_S)
        self._answered_s[pulled.pod.uid] = time.monotonic()
        return UsagePage.model_validate_json(body)

    async def acknowledge(self, pulled: PulledPod, boot_id: str, through: int) -> None:
        """Lets the runtime forget what is committed. One that is lost is sent again with the next page."""
        await self._call("DELETE", pulled, {"boot": boot_id, "through": str(through)}, ANSWER_TIMEOUT_S)

    async def commit(self, pulled: PulledPod, page: UsagePage) -> PageTaken:
        """Commits a page. Raises what the database raises."""
        began_s = time.monotonic()
        taken = await self._database.write(
            lambda connection: take(
                connection, pulled.pod, page.boot_id, page.records, page.boots, page.now_unix_ms, int(self._now_s())
            )
        )
        self._metrics.committed("runtime", taken.new, time.monotonic() - began_s)
        self._metrics.gaps("runtime", len(taken.gaps))
        for gap in taken.gaps:
            log.error("records are lost", extra={"replica": pulled.pod.name, "error": gap})
        return taken

    async def known(self, pod: Pod) -> dict[str, int]:
        return await self._database.read(lambda connection: cursors(connection, pod.uid))

    async def _call(self, method: str, pulled: PulledPod, params: Mapping[str, str], timeout_s: float) -> bytes:
        connect_s = CONNECT_TIMEOUT_S + (HANDSHAKE_TIMEOUT_S if pulled.url.startswith("https") else 0)
        tokens = self._tokens(pulled.pod.base_uid)
        for number, token in enumerate(tokens, 1):
            async with self._session.request(
                method,
                pulled.url + ROUTE_USAGE,
                params=params,
                headers={"Authorization": f"Bearer {token}"},
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_s),
                allow_redirects=False,
                ssl=self._trust.context(),
                server_hostname=server_name(pulled.pod.base_uid),
            ) as response:
                if response.status == HTTPStatus.UNAUTHORIZED and number < len(tokens):
                    continue
                response.raise_for_status()
                body = bytearray()
                async for part in response.content.iter_any():
                    body += part
                    if len(body) > PAGE_MOST_BYTES:
                        raise ValueError(f"the response is longer than {PAGE_MOST_BYTES} bytes")
                return bytes(body)
        raise AssertionError("a release has at least one master token")


class _PodPull:
    """The records of one pod, until something fails."""

    def __init__(self, pulls: Pulls, pulled: PulledPod) -> None:
        self._pulls = pulls
        self._pulled = pulled
        self._cursors: dict[str, int] = {}
        self._written_s = 0.0

    async def run(self) -> None:
        self._cursors = await self._pulls.known(self._pulled.pod)
        boots: Sequence[BootState] = ()
        while True:
            if not boots:
                boots = (await self._next("", 0.0)).boots
                continue
            *earlier, present = boots
            for state in earlier:
                await self._drain(state)
            page = await self._next(present.boot_id, WAIT_S)
            boots = page.boots
            if len(page.records) < PAGE_RECORDS:
                await asyncio.sleep(INTERVAL_S)

    async def _drain(self, state: BootState) -> None:
        """Reads what is kept of an earlier process, which then forgets its files."""
        while (await self._next(state.boot_id, 0.0)).records:
            pass
        if cursor := self._cursors.get(state.boot_id, 0):
            await self._pulls.acknowledge(self._pulled, state.boot_id, cursor)

    async def _next(self, boot_id: str, wait_s: float) -> UsagePage:
        """Reads, commits and acknowledges the next page of a process; without a name, of the oldest."""
        page = await self._pulls.get(self._pulled, boot_id, self._cursors.get(boot_id, 0), wait_s)
        if boot_id and page.boot_id != boot_id:
            raise ValueError(f"asked for records of process {boot_id} and was sent those of {page.boot_id}")
        now_s = time.monotonic()
        if page.records or now_s - self._written_s >= QUIET_WRITE_S or page.boot_id not in self._cursors:
            if not page.records and page.boot_id not in {state.boot_id for state in page.boots}:
                return page  # the runtime has forgotten it, as it may
            taken = await self._pulls.commit(self._pulled, page)
            self._written_s = now_s
            self._cursors[page.boot_id] = taken.cursor
            if page.records:
                await self._pulls.acknowledge(self._pulled, page.boot_id, taken.cursor)
        return page


def _open_boots(connection: Connection) -> list[tuple[str, str]]:
    found = select(boot.c.boot_id, boot.c.pod_uid).where(boot.c.end == "")
    return [(row.boot_id, row.pod_uid) for row in connection.execute(found)]
