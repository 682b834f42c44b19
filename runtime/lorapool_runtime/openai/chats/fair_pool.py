"""Threads that tenants share. One tenant uses half of them at most, so that its long prompts delay no other's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class FairPool:
    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._per_tenant = max(1, threads // 2)
        self._tenants: dict[str, _Tenant] = {}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Runs `work` in a thread as soon as the tenant has one free.

        A thread whose caller gave up stays taken until its work ends.
        """
        own = self._tenants.setdefault(tenant, _Tenant(self._per_tenant))
        own.users += 1
        try:
            await own.threads.acquire()
        except BaseException:
            self._leave(tenant, own)
            raise
        running = asyncio.get_running_loop().run_in_executor(self._pool, work)

        def ended(done: asyncio.Future[T]) -> None:
            own.threads.release()
            self._leave(tenant, own)
            if not done.cancelled():
                done.exception()  # it counts as seen, also when the caller gave up

        running.add_done_callback(ended)
        return await asyncio.shield(running)

    def _leave(self, tenant: str, own: _Tenant) -> None:
        own.users -= 1
        if own.users == 0:
            del self._tenants[tenant]


class _Tenant:
    def __init__(self, threads: int) -> None:
        self.threads = asyncio.Semaphore(threads)
        self.users = 0
        """Works that wait or run."""
