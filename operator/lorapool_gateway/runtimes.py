"""What the runtimes say about themselves: one long-poll of `GET /v1/runtime` per pod.

Called by watch, which tells it the pods to follow. A pod is followed from the moment it has an address, so a
starting runtime is used as soon as it says that it is ready, and with the API server down as well. On failure
its state is dropped, not guessed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import aiohttp

from lorapool_api.protocol import ROUTE_RUNTIME, RuntimeSnapshot
from lorapool_gateway.objects import RuntimeState, runtime_state

log = logging.getLogger(__name__)

POLL_WAIT_S = 20.0
CONNECT_TIMEOUT_S = 1.0
INTERVAL_S = 0.1
"""Between two answers of one runtime: under load its state changes with every request."""
PARSE_SHARE = 20
"""And at least this many times what reading the last answer took, so thousands of adapters cost 5 % of a core."""
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class Followed(NamedTuple):
    url: str
    base_uid: str


class RuntimePolls:
    def __init__(
        self, session: aiohttp.ClientSession, token: Callable[[str], str], on_change: Callable[[], None]
    ) -> None:
        """`token(base_uid)` is the bearer token of a base's runtimes."""
        self._session = session
        self._token = token
        self._on_change = on_change
        self._tasks: dict[str, tuple[Followed, asyncio.Task[None]]] = {}
        self.states: dict[str, RuntimeState] = {}
        """By pod uid; absent while unknown."""
        self.failed: set[str] = set()
        """Pods whose last poll failed."""

    def follow(self, pods: Mapping[str, Followed]) -> None:
        """From now on exactly these."""
        for pod_uid, (followed, task) in list(self._tasks.items()):
            if pods.get(pod_uid) != followed:
                task.cancel()
                del self._tasks[pod_uid]
                self.states.pop(pod_uid, None)
                self.failed.discard(pod_uid)
        for pod_uid, followed in pods.items():
            if pod_uid not in self._tasks:
                task = asyncio.create_task(self._poll(pod_uid, followed), name=f"poll {followed.url}")
                self._tasks[pod_uid] = (followed, task)

    async def close(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        self.follow({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, pod_uid: str, followed: Followed) -> None:
        after: int | None = None
        failures = 0
        while True:
            try:
                body = await self._get(followed, after)
                began_s = time.monotonic()
                snapshot = RuntimeSnapshot.model_validate_json(body)
                state = runtime_state(snapshot)
                spent_s = time.monotonic() - began_s
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                if failures == 0:
                    log.info("runtime does not answer", extra={"replica": followed.url, "error": repr(error)[:200]})
                after = None  # a new process counts from the start
                self._set(pod_uid, None)
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)] * random.uniform(0.7, 1.3))
                failures += 1
                continue
            failures = 0
            after = snapshot.seq
            self._set(pod_uid, state)
            await asyncio.sleep(max(INTERVAL_S, PARSE_SHARE * spent_s))

    async def _get(self, followed: Followed, after: int | None) -> bytes:
        params = {} if after is None else {"after": str(after), "wait": str(POLL_WAIT_S)}
        headers = {"Authorization": f"Bearer {self._token(followed.base_uid)}"}
        limits = aiohttp.ClientTimeout(total=POLL_WAIT_S + 10, sock_connect=CONNECT_TIMEOUT_S)
        async with self._session.get(
            followed.url + ROUTE_RUNTIME, params=params, headers=headers, timeout=limits, allow_redirects=False
        ) as response:
            response.raise_for_status()
            return await response.read()

    def _set(self, pod_uid: str, state: RuntimeState | None) -> None:
        failed = state is None
        if self.states.get(pod_uid) == state and (pod_uid in self.failed) == failed:
            return
        if state is None:
            self.states.pop(pod_uid, None)
            self.failed.add(pod_uid)
        else:
            self.states[pod_uid] = state
            self.failed.discard(pod_uid)
        self._on_change()
