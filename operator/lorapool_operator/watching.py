"""kopf's watches, each in a thread of its own, and the inbox through which their events reach the operator's loop.

kopf ends as a whole when one of its watches is refused for good (403: the Role is gone), and then cancels every task of
its event loop. One kopf for each watched namespace, in a thread with its own loop, confines that to the namespace. It
also keeps kopf's work for each event away from the loop that renews the Lease. Decision 24 has the alternatives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import kopf
from aiohttp import ClientHandlerType, ClientMiddlewareType, ClientRequest, ClientResponse

from lorapool_operator.handlers import Feed, NoMemories, pinned_settings, registry_of
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.tuning_intake import TuningIntake

log = logging.getLogger(__name__)

NO_OBJECT = "metadata.name=none"
"""Selects nothing: if there is an object of this name, an event of it more does no harm."""
STOP_S = 10.0
"""A kopf that does not end within this time is left to its daemon thread."""
TLS_GOODBYE_S = 3.0
"""kopf's TLS connections close a moment after their session; the loop waits for them, but not longer than this."""


class WatchError(Exception):
    """The watches of a namespace ended by themselves."""


class Event(NamedTuple):
    feed: Feed
    raw: Mapping[str, Any]
    deleted: bool


class Inbox:
    """Events from kopf's threads, in the order of their arrival."""

    def __init__(self, turn: Callable[[], Awaitable[None]]) -> None:
        """`turn()` waits until the event loop has time for one more event."""
        self._turn = turn
        self._events: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()

    def put(self, feed: Feed, raw: Mapping[str, Any], deleted: bool) -> None:
        """Is called in a thread of kopf; `feed` will be called in the loop that made the inbox."""
        self._events.append(Event(feed, raw, deleted))
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def empty_forever(self) -> None:
        """Hands on the events, and lets other tasks run in between."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._events:
                await self._turn()
                _feed(self._events.popleft())


def _feed(event: Event) -> None:
    try:
        event.feed(event.raw, deleted=event.deleted)
    except Exception:  # one object must not stop the events of all others; the resync reads it again
        log.exception("event not taken", extra={"object": str((event.raw.get("metadata") or {}).get("name"))})


KOPF_LOGGERS = (
    "kopf._core.reactor.observation",
    "kopf._core.reactor.orchestration",
    "kopf._core.reactor.running",
)


def _says_something(record: logging.LogRecord) -> bool:
    """False for what kopf says twice or in vain.

    These are that it leaves signals alone in a thread, where the process handles them itself, the traceback of a watch
    that ends, which WatchError carries to the report of the namespace, and that the one optional API is missing.
    """
    text = record.getMessage()
    if "Unresolved resources" in text and text.rpartition(": ")[2].startswith("leaderworkersets"):
        return False
    return "OS signals are ignored" not in text and not (record.exc_info and " has failed: " in text)


def _log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Leaves out the tasks of watches that ended: their failure is WatchError's, whenever they are collected."""
    if "never retrieved" not in context["message"]:
        loop.default_exception_handler(context)


def _open_sockets(loop: asyncio.AbstractEventLoop) -> int:
    """The number of sockets that the loop watches, besides the one by which it is woken."""
    watched: int = len(loop._selector.get_map())  # type: ignore[attr-defined]  # there is no public way
    return watched - 1


class KopfThread:
    """One kopf, which watches one namespace or the whole cluster (None)."""

    def __init__(self, namespace: str | None, make_registry: Callable[[], kopf.OperatorRegistry]) -> None:
        self._namespace = namespace
        self._make_registry = make_registry
        self._stop_requested = False
        self._stop: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    async def run(self) -> None:
        """Runs until cancelled. Raises WatchError when kopf ends by itself."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()

        for name in KOPF_LOGGERS:
            logging.getLogger(name).addFilter(_says_something)  # adding it again has no effect

        def body() -> None:
            reason = self._body()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(ended.set_result, reason)

        threading.Thread(target=body, name=f"kopf {self._namespace or '*'}", daemon=True).start()
        try:
            raise WatchError(await asyncio.shield(ended))
        finally:
            self._request_stop()
            await asyncio.wait([ended], timeout=STOP_S)

    def _request_stop(self) -> None:
        self._stop_requested = True
        if self._stop is not None:
            loop, event = self._stop
            with contextlib.suppress(RuntimeError):  # kopf's loop has ended already
                loop.call_soon_threadsafe(event.set)

    def _body(self) -> str:
        """Runs kopf to its end in this thread. Returns why it ended."""
        try:
            asyncio.run(self._kopf())
        except BaseException as error:  # of any kind: the thread's end must be known
            return f"{type(error).__name__}: {error}"
        return "kopf ended"

    async def _kopf(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_unexpected)
        self._stop = (loop, stop)
        if self._stop_requested:
            return
        try:
            await kopf.operator(
                registry=self._make_registry(),
                settings=pinned_settings(),
                memories=NoMemories(),
                standalone=True,
                clusterwide=self._namespace is None,
                namespaces=(self._namespace,) if self._namespace is not None else (),
                stop_flag=stop,
            )
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TLS_GOODBYE_S):
                    while _open_sockets(loop):  # noqa: ASYNC110  their closing has no event
                        await asyncio.sleep(0.05)


def continue_from(versions: Mapping[str, str]) -> ClientMiddlewareType:
    """Returns a middleware that makes kopf's first listing of each kind an empty one of the given version.

    The operator itself lists all objects, in pages, before it watches; kopf watches from the version of that listing.
    A listing by kopf would cost another millisecond and a kilobyte for each object. A later listing, after the API
    server has forgotten the version, is left as it is.
    """
    waiting = dict(versions)

    async def middleware(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        lists = request.method == "GET" and "watch" not in request.url.query
        version = waiting.pop(request.url.name, "") if lists else ""
        if version:
            request.url = request.url.update_query(
                fieldSelector=NO_OBJECT, resourceVersion=version, resourceVersionMatch="Exact"
            )
        return await handler(request)

    return middleware


def watcher(
    inbox: Inbox,
    intake: Intake,
    login: Callable[[ClientMiddlewareType], Any],
    versions: Callable[[str | None], Mapping[str, str]],
    tuning: TuningIntake | None = None,
) -> Callable[[str | None], Awaitable[None]]:
    """Returns the function that watches one namespace, from `versions` on, until it is cancelled or fails.

    `login(middleware)` returns kopf's login handler.
    """

    async def watch(namespace: str | None) -> None:
        def registry() -> kopf.OperatorRegistry:
            return registry_of(intake, inbox.put, login(continue_from(versions(namespace))), tuning)

        await KopfThread(namespace, registry).run()

    return watch
