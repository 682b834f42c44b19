"""The connections between the runtimes of a group: each worker's to its leader, open for as long as both live.

vLLM's processes wait for each other without an end and do not say which one is missing. Here the leader knows which
workers have the base, starts only when all have, and learns within seconds when one is lost. Lines of JSON go both
ways; none of them is a secret, and the port is reached by the pods of the group alone, as are vLLM's own.

    worker -> leader   {"index": 1, "identity": "..."}   then {"ready": true}, {"failed": "...", "reason": "..."}, {}
    leader -> worker   {"refused": "..."} or {"start": true}, then {}
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lorapool_api.common import Reason
from lorapool_runtime.engines.errors import EngineStartError, GroupError
from lorapool_runtime.engines.vllm.config import Group

log = logging.getLogger(__name__)

BEAT_S = 2.0
SILENCE_S = 30.0
"""A process that sends nothing for this long is lost: its machine or its network is."""
RETRY_S = 1.0
REPORT_S = 30.0
LINE_MAX = 8192


class Link:
    """One connection. Writes and reads may be in two threads."""

    def __init__(self, connection: socket.socket, silence_s: float = SILENCE_S) -> None:
        self._connection = connection
        self._writing = threading.Lock()
        connection.settimeout(silence_s)

    def send(self, **message: Any) -> None:
        """Raises OSError where the other end is gone."""
        with self._writing:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages until the other end closes. Raises OSError after silence, ValueError for what is no message."""
        with self._connection.makefile("rb") as lines:
            while line := lines.readline(LINE_MAX):
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise ValueError("not a message of a group")
                yield message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes the reader, who closes the file
        self._connection.close()


class Leader:
    """Listens from the start on. `on_lost` is called once, in a thread of its own, for the first worker that is lost.

    identity: what all pods of the group must have in common.
    """

    def __init__(self, group: Group, identity: str, on_lost: Callable[[EngineStartError], None]) -> None:
        self._group = group
        self._identity = identity
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._links: dict[int, Link] = {}
        self._ready: set[int] = set()
        self._failure: EngineStartError | None = None
        self._closed = threading.Event()
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", group.port + 1), family=family, dualstack_ipv6=family == socket.AF_INET6
        )
        self._start(self._accept, "group-accept")
        self._start(self._beat, "group-beat")

    def wait_until_ready(self) -> None:
        """Blocks until every worker has the base and can start. Raises EngineStartError if one cannot."""
        wanted = set(range(1, self._group.size))
        reported_s = time.monotonic()
        with self._changed:
            while self._ready != wanted and self._failure is None and not self._closed.is_set():
                self._changed.wait(RETRY_S)
                if time.monotonic() - reported_s > REPORT_S:
                    reported_s, missing = time.monotonic(), sorted(wanted - self._ready)
                    log.info("waiting for workers %s of the group to load the base", ", ".join(map(str, missing)))
            if self._failure is not None:
                raise self._failure
            if self._closed.is_set():
                raise GroupError("the group was ended while it started")

    def begin(self) -> None:
        """Lets the workers start vLLM."""
        self._send_all(start=True)

    def close(self) -> None:
        """Ends the group: workers end when their leader's connection does."""
        self._closed.set()
        self._listener.close()
        with self._changed:
            links = list(self._links.values())
            self._changed.notify_all()
        for link in links:
            link.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(partial(self._read, Link(connection)), "group-worker")

    def _read(self, link: Link) -> None:
        index: int | None = None
        failure: EngineStartError | None = None
        why = "it closed its connection"
        try:
            for message in link.receive():
                if index is None:
                    index = self._admit(link, message)
                    if index is None:
                        return
                elif message.get("ready"):
                    with self._changed:
                        self._ready.add(index)
                        self._changed.notify_all()
                elif "failed" in message:
                    reason = message.get("reason")
                    known = Reason(reason) if reason in set(Reason) else Reason.GROUP_ENDED
                    failure = EngineStartError(f"Worker {index} of the group: {message['failed']}", known)
                    return
        except (OSError, ValueError) as error:
            why = f"it sent nothing for {SILENCE_S:.0f} s" if isinstance(error, TimeoutError) else str(error)
        finally:
            link.close()
            if index is not None:
                lost = f"Worker {index} of the group is lost ({why}): the group starts again."
                self._lose(failure or GroupError(lost))

    def _admit(self, link: Link, hello: dict[str, Any]) -> int | None:
        index, identity = hello.get("index"), hello.get("identity")
        refused = None
        with self._changed:
            if not isinstance(index, int) or not 0 < index < self._group.size or index in self._links:
                refused = f"the group has no place {index} for it"
            elif identity != self._identity:
                refused = f"it is {identity}, and the leader is {self._identity}: both need the same image and settings"
            else:
                self._links[index] = link
                return index
        with contextlib.suppress(OSError):
            link.send(refused=refused)
        return None

    def _lose(self, failure: EngineStartError) -> None:
        with self._changed:
            if self._closed.is_set() or self._failure is not None:
                return
            self._failure = failure
            self._changed.notify_all()
        self._on_lost(failure)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._send_all()

    def _send_all(self, **message: Any) -> None:
        with self._changed:
            links = list(self._links.values())
        for link in links:
            with contextlib.suppress(OSError):  # its reader notices
                link.send(**message)

    def _start(self, work: Callable[[], None], name: str) -> None:
        threading.Thread(target=work, name=name, daemon=True).start()


class Worker:
    """A worker's connection to its leader."""

    def __init__(self, link: Link, address: str) -> None:
        self._link = link
        self._address = address
        self._started = threading.Event()
        self._ended = threading.Event()
        self.end = ""
        """Why the connection has ended."""
        for work, name in ((self._read, "group-leader"), (self._beat, "group-beat")):
            threading.Thread(target=work, name=name, daemon=True).start()

    @classmethod
    def join(cls, group: Group, identity: str, stop: threading.Event, silence_s: float = SILENCE_S) -> Worker | None:
        """Blocks until the leader listens: it may still fetch the base. None if `stop` is set before."""
        address, reported_s = (group.leader, group.port + 1), time.monotonic()
        while not stop.wait(RETRY_S):
            try:
                link = Link(socket.create_connection(address, timeout=10.0), silence_s)
                link.send(index=group.index, identity=identity)
            except OSError as error:
                if time.monotonic() - reported_s > REPORT_S:
                    reported_s = time.monotonic()
                    log.info("waiting for the leader of the group at %s:%d (%s)", *address, error)
                continue
            return cls(link, group.leader)
        return None

    def ready(self) -> None:
        self._send(ready=True)

    def failed(self, message: str, reason: Reason) -> None:
        """Tells the leader why this worker ends."""
        self._send(failed=message[:1000], reason=reason.value)

    def wait_for_start(self) -> None:
        """Blocks until the leader starts. Raises GroupError if it ends before."""
        while not self._started.wait(0.1):
            if self._ended.is_set():
                raise GroupError(self.end)

    def wait_for_end(self, timeout_s: float | None = None) -> bool:
        """Whether the leader has ended, or is lost."""
        return self._ended.wait(timeout_s)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the reader notices
            self._link.send(**message)

    def _read(self) -> None:
        end = f"The leader of the group, {self._address}, has ended: the group starts again."
        try:
            for message in self._link.receive():
                if message.get("start"):
                    self._started.set()
                elif refused := message.get("refused"):
                    end = f"The leader of the group refuses this worker: {refused}."
        except (OSError, ValueError) as error:
            end = f"The leader of the group, {self._address}, is lost ({error}): the group starts again."
        finally:
            self._link.close()
        self.end = end
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._send()
