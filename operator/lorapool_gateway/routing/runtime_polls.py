"""The states that runtimes report about themselves: one long-poll of `GET /v1/runtime` per pod.

A pod is polled from the moment it has an address. A starting runtime is therefore used as soon as it reports itself
ready, also while the API server is down. When a poll fails, the pod's state is dropped, not guessed, and the next poll
asks for all adapters; after a poll that succeeded it asks for the changes since. Only a state of draining is kept: that
process accepts nothing any more, though its pod may be listed as ready for a while.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

import aiohttp

from lorapool_api.pod_address import server_name
from lorapool_api.protocol import ROUTE_RUNTIME, RuntimeSnapshot, token_sha256
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge
from lorapool_api.trust.tls import HANDSHAKE_TIMEOUT_S, ReleaseTrust
from lorapool_gateway.routing.objects import RuntimeState, runtime_state

log = logging.getLogger(__name__)

POLL_WAIT_S = 5.0
ANSWER_TIMEOUT_S = 5.0
"""A poll fails this long after the runtime should have answered. Attempts at the pod are then given up."""
CONNECT_TIMEOUT_S = 1.0
INTERVAL_S = 0.1
"""Least time between two answers of one runtime: under load its state changes with every request."""
PARSE_SHARE = 20
"""The pause is also at least this many times the time that parsing the last answer took: with thousands of adapters,
polling then costs 5 % of a core."""
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class PolledPod(NamedTuple):
    url: str
    base_uid: str
    base: str = ""
    """namespace/name, for the log."""


class RuntimePolls:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        tokens: Callable[[str], tuple[str, ...]],
        on_change: Callable[[], None],
        trust: ReleaseTrust | None = None,
    ) -> None:
        """`tokens(base_uid)` are the bearer tokens of a base's runtimes, in the order in which to try them."""
        self._session = session
        self._trust = trust or ReleaseTrust()
        self._tokens = tokens
        self._on_change = on_change
        self._tasks: dict[str, tuple[PolledPod, asyncio.Task[None]]] = {}
        self.states: dict[str, RuntimeState] = {}
        """By pod uid; absent while unknown."""
        self.proven: set[str] = set()
        """Pods that have proved themselves since they have their present address."""
        self.failed: set[str] = set()
        """Pods whose last poll failed."""

    @property
    def polled_once(self) -> bool:
        """True if every poll has answered or failed."""
        return all(pod_uid in self.states or pod_uid in self.failed for pod_uid in self._tasks)

    def follow(self, pods: Mapping[str, PolledPod]) -> None:
        """Polls exactly these pods, by pod uid, from now on."""
        for pod_uid, (polled, task) in list(self._tasks.items()):
            if pods.get(pod_uid) != polled:
                task.cancel()
                del self._tasks[pod_uid]
                self.states.pop(pod_uid, None)
                self.failed.discard(pod_uid)
                self.proven.discard(pod_uid)
        for pod_uid, polled in pods.items():
            if pod_uid not in self._tasks:
                task = asyncio.create_task(self._poll(pod_uid, polled), name=f"poll {polled.url}")
                self._tasks[pod_uid] = (polled, task)

    async def close(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        self.follow({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, pod_uid: str, polled: PolledPod) -> None:
        state: RuntimeState | None = None
        after = 0
        failures = 0
        while True:
            try:
                body = await self._get(pod_uid, polled, after, state)
                began_s = time.monotonic()
                snapshot = RuntimeSnapshot.model_validate_json(body)
                state = runtime_state(snapshot, state)
                spent_s = time.monotonic() - began_s
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                if failures == 0:
                    self._report(polled, error)
                state = None
                if (known := self.states.get(pod_uid)) is None or not known.draining:
                    self._set(pod_uid, None)
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)] * random.uniform(0.7, 1.3))
                failures += 1
                continue
            failures = 0
            after = snapshot.seq
            self.proven.add(pod_uid)
            self._set(pod_uid, state)
            await asyncio.sleep(max(INTERVAL_S, PARSE_SHARE * spent_s))

    def _report(self, polled: PolledPod, error: Exception) -> None:
        where = {"base": polled.base, "replica": polled.url}
        if refusal := self._trust.refusal(error):
            log.error("runtime is not trusted", extra={**where, "error": refusal})
        else:
            log.info("runtime does not answer", extra={**where, "error": repr(error)[:200]})

    async def _get(self, pod_uid: str, polled: PolledPod, after: int, state: RuntimeState | None) -> bytes:
        *earlier, last = self._tokens(polled.base_uid)
        for token in earlier:
            try:
                return await self._call(pod_uid, polled, after, state, token)
            except aiohttp.ClientResponseError as error:
                if error.status != HTTPStatus.UNAUTHORIZED:
                    raise
        return await self._call(pod_uid, polled, after, state, last)

    async def _call(self, pod_uid: str, polled: PolledPod, after: int, state: RuntimeState | None, token: str) -> bytes:
        """One poll, which does not carry the token. Raises ProofError unless this pod itself answers."""
        digest = token_sha256(token)
        challenge = Challenge.new(digest, pod_uid)
        params = {} if state is None else {"after": str(after), "boot": state.boot_id, "wait": str(POLL_WAIT_S)}
        headers = {"Authorization": challenge.authorization}
        connect_s = CONNECT_TIMEOUT_S + (HANDSHAKE_TIMEOUT_S if polled.url.startswith("https") else 0)
        async with self._session.get(
            polled.url + ROUTE_RUNTIME,
            params=params,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=POLL_WAIT_S + ANSWER_TIMEOUT_S, sock_connect=connect_s),
            allow_redirects=False,
            ssl=self._trust.context(),
            server_hostname=server_name(polled.base_uid),
        ) as response:
            response.raise_for_status()
            body = await response.read()
        challenge.check(digest, response.headers.get(HEADER_PROOF), body)
        return body

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
