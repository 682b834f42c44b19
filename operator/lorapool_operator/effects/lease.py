"""Leader election: only the process that holds the Lease acts.

`may_write` is the fence that every write passes. It closes by the local clock before another process can take over, so
a leader that was suspended writes nothing when it resumes. A request to the API server that hangs counts as failed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.baselock import BaseLock

from lorapool_operator.effects.cluster import Cluster, ClusterError, ObjectNotFoundError
from lorapool_operator.settings import Settings

log = logging.getLogger(__name__)


class ClusterLock(BaseLock):  # type: ignore[misc]  # the client has no types
    """The election's lock. The client's own `LeaseLock` cannot create a Lease, since it sends `pretty=True`."""

    def __init__(self, cluster: Cluster, name: str, namespace: str, identity: str) -> None:
        super().__init__(name, namespace, identity)
        self._cluster = cluster
        self._lease: dict[str, Any] = {}
        self.renewed_at: float | None = None
        """Monotonic time just before the last successful write, at which the Lease was renewed."""

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        try:
            self._lease = await self._cluster.get("Lease", namespace, name)
        except ObjectNotFoundError:
            return False, _api_error(404)
        except ClusterError as error:
            log.warning("cannot read the Lease", extra={"error": str(error)})
            return False, _api_error(error.status)
        spec = self._lease.get("spec") or {}
        return True, LeaderElectionRecord(
            spec.get("holderIdentity") or None,
            str(spec.get("leaseDurationSeconds") or ""),
            spec.get("acquireTime"),
            spec.get("renewTime"),
        )

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name, "namespace": namespace},
            "spec": _spec(election_record, {}),
        }
        return await self._write(lease, create=True)

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        spec = _spec(updated_record, self._lease.get("spec") or {})
        return await self._write({**self._lease, "spec": spec}, create=False)

    async def release(self) -> None:
        """Releases the Lease, so that a successor need not wait for its expiry."""
        spec = {**(self._lease.get("spec") or {}), "leaseDurationSeconds": 1}
        spec.pop("holderIdentity", None)
        await self._write({**self._lease, "spec": spec}, create=False)

    async def _write(self, lease: dict[str, Any], *, create: bool) -> bool:
        began = time.monotonic()
        try:
            self._lease = await self._cluster.put_lease(lease, create=create)
        except ClusterError as error:
            log.warning("cannot write the Lease", extra={"error": str(error)})
            return False
        self.renewed_at = began
        return True


def _spec(record: LeaderElectionRecord, before: dict[str, Any]) -> dict[str, Any]:
    changed = before.get("holderIdentity") != record.holder_identity
    return {
        "holderIdentity": record.holder_identity,
        "leaseDurationSeconds": int(float(record.lease_duration)),
        "acquireTime": _rfc3339(record.acquire_time if changed else before.get("acquireTime") or record.acquire_time),
        "renewTime": _rfc3339(record.renew_time),
        "leaseTransitions": int(before.get("leaseTransitions") or 0) + int(changed and bool(before)),
    }


def _rfc3339(text: str) -> str:
    """Converts the election's times, which are local and in another format."""
    moment = datetime.fromisoformat(text)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _api_error(status: int) -> ApiException:
    """Returns the error that lets the election distinguish a missing Lease from an unreachable API server."""
    error = ApiException(status=status, reason="not found" if status == 404 else "unreachable")
    error.body = f'{{"code": {status}}}'
    return error


class Leadership:
    """Acquires and renews the Lease; without leader election, acts at once."""

    def __init__(self, settings: Settings, client: ApiClient) -> None:
        self._settings = settings
        self._client = client
        self._lock: ClusterLock | None = None
        self.leading = not settings.leader_election

    def may_write(self) -> bool:
        """True only while this process certainly holds the Lease."""
        if not self._settings.leader_election:
            return True
        renewed_at = self._lock.renewed_at if self._lock is not None else None
        if not self.leading or renewed_at is None:
            return False
        return time.monotonic() - renewed_at < self._settings.lease_renew_deadline_s

    async def run(self, act: Callable[[], Awaitable[None]]) -> None:
        """Waits for the Lease, runs `act`, and returns when the Lease is lost or `act` ends. Raises what `act` does."""
        settings = self._settings
        if not settings.leader_election:
            await act()
            return
        unfenced = Cluster(self._client, timeout_s=settings.lease_retry_s, identity=settings.identity)
        self._lock = ClusterLock(unfenced, settings.lease_name, settings.own_namespace, settings.identity)
        acting: list[asyncio.Task[None]] = []
        began = asyncio.Event()

        async def started() -> None:
            """Runs `act` in a task of its own: the election would not cancel the task when it is cancelled itself."""
            self.leading = True
            log.info("leading", extra={"identity": settings.identity})
            acting.append(asyncio.create_task(_as_coroutine(act), name="acting"))
            began.set()

        async def stopped() -> None:
            log.error("lost the Lease", extra={"identity": settings.identity})

        config = electionconfig.Config(
            self._lock,
            lease_duration=settings.lease_duration_s,
            renew_deadline=settings.lease_renew_deadline_s,
            retry_period=settings.lease_retry_s,
            onstarted_leading=started,
            onstopped_leading=stopped,
        )
        election = asyncio.create_task(leaderelection.LeaderElection(config).run(), name="leader election")
        beginning = asyncio.create_task(began.wait(), name="waiting for the lease")
        try:
            await asyncio.wait({election, beginning}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({election, *acting}, return_when=asyncio.FIRST_COMPLETED)
            for task in (election, *acting):
                if task.done():
                    task.result()
        finally:
            held, self.leading = self.may_write(), False
            for task in (election, beginning, *acting):
                task.cancel()
            await asyncio.gather(election, beginning, *acting, return_exceptions=True)
            if held:
                await self._lock.release()


async def _as_coroutine(act: Callable[[], Awaitable[None]]) -> None:
    await act()
