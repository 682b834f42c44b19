"""Raw HTTP/1.1 on asyncio protocols: a stub runtime that answers at once, and minimal clients that check and count.

`gateway_overhead` runs both in one process on a core of their own: a library's client would be slower than the gateway.
Each client has one connection with one request in flight. A wrong status, a short body or a truncated stream raises,
so that a fast wrong answer is not counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import cast

from lorapool_api.common import HEADER_ADAPTER, HEADER_USAGE
from lorapool_api.protocol import ROUTE_CHAT, USAGE_COMMENT

EVENTS = 20
"""Data events of one stream, without [DONE]."""
USAGE = b'{"prompt_tokens":5,"completion_tokens":20,"cached_tokens":0}'
SPACED = b'"spaced"'
"""A marker in a request's first bytes: events are sent EVENT_EVERY_S apart, so that a stream stays open."""
EVENT_EVERY_S = 0.1
TIMER_S = 0.0015

_EVENT = b"data: " + json.dumps({
    "id": "chatcmpl-0123456789abcdef01234567", "object": "chat.completion.chunk", "created": 1767225600,
    "model": "demo/a0", "system_fingerprint": "fp_0123456789ab",
    "choices": [{"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}],
}).encode() + b"\n\n"  # fmt: skip
_DONE = b"data: [DONE]\n\n"
_COMMENT = USAGE_COMMENT + USAGE + b"\n"
_ANSWER = json.dumps(
    {"id": "c", "object": "chat.completion", "choices": [{"message": {"content": "x" * 400}}]}
).encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# --- the runtime that answers at once -----------------------------------------------------


class StubRuntime(asyncio.Protocol):
    """One connection of the stub runtime. It parses no JSON: a marker in the body's first bytes selects streaming.

    As a runtime does, it sends a whole answer as an event to a gateway that accepts events, and as JSON to others.
    """

    def __init__(self, identity: str) -> None:
        head = b"HTTP/1.1 200 OK\r\n%b: %b\r\n" % (HEADER_ADAPTER.encode(), identity.encode())
        self._whole = head + b"%b: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
            HEADER_USAGE.encode(), USAGE, len(_ANSWER), _ANSWER,
        )  # fmt: skip
        self._stream_head = head + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        self._stream_end = _chunk(_COMMENT + _DONE) + b"0\r\n\r\n"
        self._whole_event = self._stream_head + _chunk(_COMMENT + b"data: " + _ANSWER + b"\n\n") + b"0\r\n\r\n"
        self._event = _chunk(_COMMENT + _EVENT)
        self._transport: asyncio.Transport | None = None
        self._head = bytearray()
        self._body_start = b""
        self._takes_events = False
        self._left: int | None = None  # bytes of the body still missing; None: the head is not complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = bytes(self._head[:end]).lower(), bytes(self._head[end + 4 :])
            self._head.clear()
            at = head.index(b"content-length:") + 15
            self._left = int(head[at:].split(b"\r\n", 1)[0])
            self._body_start = b""
            self._takes_events = b"accept: text/event-stream" in head
        if len(self._body_start) < 100:
            self._body_start += data[:100]
        self._left -= len(data)
        if self._left <= 0:
            self._left = None
            self._answer(self._body_start)

    def _answer(self, start: bytes) -> None:
        assert self._transport is not None
        if b'"stream": true' not in start:
            self._transport.write(self._whole_event if self._takes_events else self._whole)
        elif SPACED in start:
            self._transport.write(self._stream_head)
            self._next(EVENTS)
        else:
            self._transport.write(self._stream_head + self._event * EVENTS + self._stream_end)

    def _next(self, left: int) -> None:
        if self._transport is None:
            return
        self._transport.write(self._event if left else self._stream_end)
        if left:
            asyncio.get_running_loop().call_later(EVENT_EVERY_S, self._next, left - 1)


# --- the clients --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of request, as bytes on the wire."""

    wire: bytes
    stream: bool
    spaced: bool = False

    @classmethod
    def of(cls, key: str, *, stream: bool, prompt_bytes: int, spaced: bool = False) -> Ask:
        first = {"stream": stream, **({"user": "spaced"} if spaced else {})}
        body = json.dumps(
            {
                **first,
                "model": "demo/a0",
                "messages": [{"role": "user", "content": ("word " * prompt_bytes)[:prompt_bytes]}],
            }
        ).encode()
        head = (
            f"POST {ROUTE_CHAT} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return cls(head.encode() + body, stream, spaced)


class Client(asyncio.Protocol):
    """One persistent connection. `ask` sends a request; its future completes at the answer's end or raises what was
    wrong.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._ends = -1  # where the answer ends in _data; -1: unknown
        self._stream = False
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed before the answer's end"))

    def ask(self, ask: Ask) -> asyncio.Future[None]:
        if self._transport is None:
            raise ConnectionError("the connection is closed")
        self._data.clear()
        self._ends, self._stream = -1, ask.stream
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(ask.wire)
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._answer is None or self._answer.done():
            raise RuntimeError("an answer without a request")
        if self._stream:
            if self._data.endswith(b"\r\n0\r\n\r\n"):
                self._check(self._data.count(b"data: ") == EVENTS + 1 and b"data: [DONE]" in self._data)
            elif b" 200 " not in self._data[:16]:
                self._check(False)
            return
        if self._ends < 0:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._data[:end]).lower()
            length = int(head[head.index(b"content-length:") + 15 :].split(b"\r\n", 1)[0])
            self._ends = end + 4 + length
        if len(self._data) >= self._ends:
            self._check(self._data.endswith(_ANSWER))

    def _check(self, right: bool) -> None:
        assert self._answer is not None
        if right and self._data.startswith(b"HTTP/1.1 200 "):
            self._answer.set_result(None)
        else:
            self._answer.set_exception(RuntimeError(f"a wrong answer: {bytes(self._data[:400])!r}"))


async def connect(port: int, count: int) -> list[Client]:
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(count):
        _, client = await loop.create_connection(Client, "127.0.0.1", port)
        clients.append(client)
    return clients


@dataclass(slots=True)
class Round:
    """The counts and latencies of one round."""

    latencies_s: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_s(self) -> float:
        return len(self.latencies_s) / self.seconds


async def closed_loop(clients: list[Client], ask: Ask, seconds: float) -> Round:
    """Each client sends its next request as soon as it has its answer: the maximum rate."""
    done = Round()
    began_s = time.perf_counter()

    async def one(client: Client) -> None:
        while (asked_s := time.perf_counter()) - began_s < seconds:
            await client.ask(ask)
            done.latencies_s.append(time.perf_counter() - asked_s)

    await asyncio.gather(*(one(client) for client in clients))
    done.seconds = time.perf_counter() - began_s
    return done


async def once_each(clients: list[Client], ask: Ask) -> tuple[int, float]:
    """Every client sends one request at the same time. Returns how many failed and the seconds until the last one
    ended.
    """
    began_s = time.perf_counter()
    ended = await asyncio.gather(*(client.ask(ask) for client in clients), return_exceptions=True)
    return sum(isinstance(item, BaseException) for item in ended), time.perf_counter() - began_s


async def open_loop(clients: list[Client], ask: Ask, per_s: float, seconds: float, seed: int) -> Round:
    """Poisson arrivals; a request without a free connection waits for one. Latency counts from the arrival, so that a
    gateway that falls behind cannot hide it.
    """
    done, rng = Round(), random.Random(seed)
    free, waiting = deque(clients), deque[float]()
    loop = asyncio.get_running_loop()
    all_done: asyncio.Future[None] = loop.create_future()
    arrived, over = 0, False

    def send(client: Client, arrived_s: float) -> None:
        client.ask(ask).add_done_callback(lambda answer: ended(client, arrived_s, answer))

    def ended(client: Client, arrived_s: float, answer: asyncio.Future[None]) -> None:
        if (error := answer.exception()) is not None:
            if not all_done.done():
                all_done.set_exception(error)
            return
        done.latencies_s.append(time.perf_counter() - arrived_s)
        if waiting:
            send(client, waiting.popleft())
        else:
            free.append(client)
        if over and len(done.latencies_s) == arrived and not all_done.done():
            all_done.set_result(None)

    began_s = next_s = time.perf_counter()
    while next_s < began_s + seconds and not all_done.done():
        left_s = next_s - time.perf_counter()
        await asyncio.sleep(left_s if left_s > TIMER_S else 0)  # a timer is late by its resolution
        while next_s <= time.perf_counter() and next_s < began_s + seconds:
            arrived += 1
            if free:
                send(free.popleft(), next_s)
            else:
                waiting.append(next_s)
            next_s += rng.expovariate(per_s)
    over = True
    if len(done.latencies_s) < arrived or all_done.done():
        await all_done
    done.seconds = time.perf_counter() - began_s
    return done
