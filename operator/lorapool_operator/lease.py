"""Who acts: the one process that holds the Lease.

Called by `__main__` before anything is watched. `may_write` is the fence that every write passes: it closes by the
local clock before another process can take over, so a leader that was paused writes nothing when it wakes.
A call of the API server that hangs counts as one that failed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from lorapool_operator.settings import Settings

log = logging.getLogger(__name__)


class _TimedLock(LeaseLock):  # type: ignore[misc]  # the client has no types
    """The client's lock, but every way to fail is a failed attempt and none takes longer than a retry period."""

    def __init__(self, name: str, namespace: str, identity: str, client: ApiClient, timeout_s: float) -> None:
        super().__init__(name, namespace, identity, client)
        self._timeout_s = timeout_s
        self.renewed_at: float | None = None
        """Monotonic time before the last write that succeeded: the Lease is ours from then on."""

    async def get(self, name: str, namespace: str) -> Any:
        answer = await self._try(super().get(name, namespace))
        return answer if answer is not None else (False, _Unreachable())

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        return await self._renew(super().create(name, namespace, election_record))

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        return await self._renew(super().update(name, namespace, updated_record))

    async def _renew(self, work: Awaitable[bool]) -> bool:
        began = time.monotonic()
        renewed = bool(await self._try(work))
        if renewed:
            self.renewed_at = began
        return renewed

    async def _try(self, work: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("lease not reached", extra={"error": f"{type(error).__name__} {error}"})
            return None


class _Unreachable(Exception):
    """What the election is told when the API server could not be asked."""

    reason = "unreachable"
    body = None


class Leadership:
    """Acquires and renews; `may_write` is true only while the Lease is surely held."""

    def __init__(self, settings: Settings, client: ApiClient) -> None:
        self._settings = settings
        self._client = client
        self._lock: _TimedLock | None = None
        self.leading = not settings.leader_election

    def may_write(self) -> bool:
        if not self._settings.leader_election:
            return True
        renewed_at = self._lock.renewed_at if self._lock is not None else None
        if not self.leading or renewed_at is None:
            return False
        return time.monotonic() - renewed_at < self._settings.lease_renew_deadline_s

    async def run(self, act: Callable[[], Awaitable[None]]) -> None:
        """Waits for the Lease, runs `act`, and returns when either ends. Raises what `act` raises."""
        settings = self._settings
        if not settings.leader_election:
            await act()
            return
        self._lock = _TimedLock(
            settings.lease_name, settings.own_namespace, settings.identity, self._client, settings.lease_retry_s
        )
        acting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def started() -> None:
            self.leading = True
            log.info("leading", extra={"identity": settings.identity})
            try:
                await act()
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                if not acting.done():
                    acting.set_exception(error)
                return
            if not acting.done():
                acting.set_result(None)

        async def stopped() -> None:
            log.error("the Lease is lost", extra={"identity": settings.identity})

        config = electionconfig.Config(
            self._lock,
            lease_duration=settings.lease_duration_s,
            renew_deadline=settings.lease_renew_deadline_s,
            retry_period=settings.lease_retry_s,
            onstarted_leading=started,
            onstopped_leading=stopped,
        )
        election = asyncio.create_task(leaderelection.LeaderElection(config).run(), name="leader election")
        try:
            await asyncio.wait({election, acting}, return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                acting.result()
            elif election.done() and election.exception() is not None:
                election.result()
        finally:
            self.leading = False
            election.cancel()
            await asyncio.gather(election, return_exceptions=True)
            if not acting.done():
                acting.cancel()
