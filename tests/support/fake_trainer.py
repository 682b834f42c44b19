"""A trainer that trains nothing: it serves the protocol over a real socket, and a test says what it reports.

It keeps what it was sent. Which jobs it gets, when, and what follows from its reports is the operator's work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from lorapool_api.protocol import token_sha256
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge
from lorapool_api.tuning.states import JobState
from lorapool_api.tuning.trainer_protocol import (
    ROUTE_JOB,
    ROUTE_TRAINER,
    JobReport,
    PutJobAnswer,
    TrainerBase,
    TrainerJob,
    TrainerSnapshot,
)

DIGEST = "sha256:" + "a" * 64


@dataclass
class FakeTrainer:
    """One process; `boot_id` may be changed to stand for its restart."""

    token: str
    boot_id: str = "boot-1"
    port: int = 0
    jobs: dict[str, TrainerJob] = field(default_factory=dict)
    reports: dict[str, JobReport] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    """Uid of each PUT, in order."""
    deletes: list[str] = field(default_factory=list)
    idle_since_unix_s: float | None = None
    late: bool = False
    """A job that was sent does not end the poll that waits."""
    _seq: int = 1
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def say(self, uid: str, state: JobState, **more: Any) -> None:
        """Reports this of a job from now on."""
        self.reports[uid] = self._report(uid, state, **more)
        await self._news()

    def _report(self, uid: str, state: JobState, **more: Any) -> JobReport:
        job = self.jobs[uid]
        return JobReport.model_validate(
            {
                "uid": uid, "display": job.display, "run": job.run, "priority": job.priority, "state": state,
                "since_unix_s": time.time(), **more,
            }
        )  # fmt: skip

    async def idle(self, seconds: float) -> None:
        """Reports that nothing could be trained for so long."""
        self.idle_since_unix_s = time.time() - seconds
        await self._news()

    async def restart(self, boot_id: str) -> None:
        """Forgets everything, as a new process does."""
        self.boot_id = boot_id
        self.jobs, self.reports = {}, {}
        await self._news()

    async def _news(self) -> None:
        async with self._changed:
            self._seq += 1
            self._changed.notify_all()

    def _snapshot(self) -> TrainerSnapshot:
        return TrainerSnapshot(
            seq=self._seq,
            boot_id=self.boot_id,
            started_unix_s=0.0,
            now_unix_s=time.time(),
            trainer_version="0.1.0",
            ready=True,
            base=TrainerBase(digest=DIGEST, dtype="float32", device="cpu"),
            idle_since_unix_s=self.idle_since_unix_s,
            jobs=list(self.reports.values()),
        )

    async def _trainer(self, request: web.Request) -> web.Response:
        digest = token_sha256(self.token)
        challenge = Challenge.parse(request.headers.get("Authorization", ""))
        if challenge is None or not challenge.is_from(digest):
            return web.Response(status=401)
        query = request.query
        if query.get("boot") == self.boot_id and int(query.get("after", "0")) >= self._seq:
            async with self._changed:
                try:
                    async with asyncio.timeout(float(query["wait"])):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        body = self._snapshot().model_dump_json(by_alias=True).encode()
        return web.Response(body=body, headers={HEADER_PROOF: challenge.answer(digest, body)})

    def _permitted(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.token}"

    async def _put(self, request: web.Request) -> web.Response:
        if not self._permitted(request):
            return web.Response(status=401)
        uid = request.match_info["uid"]
        self.jobs[uid] = TrainerJob.model_validate_json(await request.read())
        self.puts.append(uid)
        self.idle_since_unix_s = None
        known = self.reports.get(uid)
        if known is None and self.late:
            self.reports[uid] = self._report(uid, JobState.QUEUED)
        elif known is None:
            await self.say(uid, JobState.QUEUED)
        else:
            job = self.jobs[uid]
            self.reports[uid] = known.model_copy(update={"run": job.run, "priority": job.priority})
            await self._news()
        answer = PutJobAnswer(boot_id=self.boot_id, job=self.reports[uid])
        return web.Response(text=answer.model_dump_json(by_alias=True), content_type="application/json")

    async def _delete(self, request: web.Request) -> web.Response:
        if not self._permitted(request):
            return web.Response(status=401)
        uid = request.match_info["uid"]
        self.jobs.pop(uid, None)
        self.reports.pop(uid, None)
        self.deletes.append(uid)
        await self._news()
        return web.Response(status=204)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeTrainer]:
        """Listens on a free port of this machine inside the context."""
        app = web.Application()
        app.router.add_get(ROUTE_TRAINER, self._trainer)
        app.router.add_put(ROUTE_JOB, self._put)
        app.router.add_delete(ROUTE_JOB, self._delete)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = int(runner.addresses[0][1])
            yield self
        finally:
            await runner.cleanup()
