"""The gateway's HTTP client at runtimes that respond byte by byte, too early, with too much, or never."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from lorapool_gateway.requests.http_client import HEAD_MAX_BYTES, HttpClient
from lorapool_gateway.requests.http_response import (
    BUFFER_BYTES,
    ConnectError,
    ConnectionLostError,
    HttpResponse,
    ReadTimeoutError,
)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-One: a\r\n\r\nok"


@asynccontextmanager
async def runtime(serve: Serve) -> AsyncIterator[str]:
    """A server that calls `serve` for each connection; yields its URL."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.sleep(0.01)


@pytest.fixture
async def http():
    made = HttpClient(read_timeout_s=1.0)
    yield made
    await made.close()


async def one_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


def scripted(*answers: bytes, then: float = 0.0) -> Serve:
    """Sends the given responses to the requests of a connection, waits, and closes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await one_request(reader)
            writer.write(answer)
        await asyncio.sleep(then)

    return serve


async def ask(http: HttpClient, url: str, body: bytes = b"{}") -> tuple[int, bytes | None]:
    answer = await http.send(url, "POST", "/v1/x", {"X-A": "1"}, body)
    try:
        await answer.head()
        return answer.status, await answer.read_all(2**20)
    finally:
        answer.close()


async def test_a_request_is_sent_as_given_and_the_first_of_two_headers_of_one_name_counts(http: HttpClient) -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await one_request(reader))
        writer.write(OK.replace(b"X-One: a", b"X-One: a\r\nx-one: b"))

    async with runtime(serve) as url:
        answer = await http.send(url, "POST", "/v1/x", {"X-A": "1"}, b"body")
        assert await answer.head()
        assert (answer.status, answer.headers["x-one"], await answer.read_all(10)) == (200, "a", b"ok")
        answer.close()
        host = url.removeprefix("http://").encode()
    assert seen == [b"POST /v1/x HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 4\r\nX-A: 1\r\n\r\nbody"]


async def test_a_connection_is_kept_for_the_next_request_and_given_up_when_it_was_idle_for_long() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await one_request(reader)
            writer.write(OK)

    http = HttpClient(idle_s=0.5)
    async with runtime(serve) as url:
        assert [await ask(http, url) for _ in range(3)] == [(200, b"ok")] * 3
        assert connections == 1
        await asyncio.sleep(1.2)
        await ask(http, url)
        assert connections == 2
        await http.close()


async def test_a_kept_connection_that_the_runtime_has_closed_is_not_used_again(http: HttpClient) -> None:
    async with runtime(scripted(OK)) as url:
        for _ in range(3):
            assert await ask(http, url) == (200, b"ok")
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_an_answer_may_come_in_any_pieces(http: HttpClient, cut: int) -> None:
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await one_request(reader)
        for piece in (whole[:cut], whole[cut:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)

    async with runtime(serve) as url:
        assert await ask(http, url) == (200, b"abcde")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (HEAD_MAX_BYTES + 1),
    ],
)
async def test_what_is_no_head_is_a_lost_answer(http: HttpClient, answer: bytes) -> None:
    async with runtime(scripted(answer, then=0.05)) as url:
        with pytest.raises(ConnectionLostError):
            await ask(http, url)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nno length: its end cannot be recognized",
    ],
)
async def test_a_body_without_its_end_is_lost_after_what_came_of_it(http: HttpClient, answer: bytes) -> None:
    async with runtime(scripted(answer, then=0.02)) as url:
        got = await http.send(url, "POST", "/", {}, b"")
        assert await got.head()
        with pytest.raises(ConnectionLostError):
            await got.read_all(1000)
        got.close()


async def test_bytes_behind_an_answer_end_the_connection_and_reach_no_other_request(http: HttpClient) -> None:
    async with runtime(scripted(OK + OK, OK, then=0.1)) as url:
        assert await ask(http, url) == (200, b"ok")
        assert await ask(http, url) == (200, b"ok")


async def test_trailers_become_no_headers_of_the_next_answer(http: HttpClient) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-one\r\n\r\n2\r\nok\r\n0\r\nX-One: b\r\n\r\n"
    async with runtime(scripted(chunked, OK)) as url:
        for headers in ({"transfer-encoding": "chunked", "trailer": "x-one"}, {"content-length": "2", "x-one": "a"}):
            answer = await http.send(url, "POST", "/", {}, b"")
            assert await answer.head()
            assert (answer.headers, await answer.read_all(10)) == (headers, b"ok")
            answer.close()


async def test_an_interim_answer_is_not_the_answer(http: HttpClient) -> None:
    async with runtime(scripted(b"HTTP/1.1 100 Continue\r\nX-One: no\r\n\r\n" + OK)) as url:
        answer = await http.send(url, "POST", "/", {}, b"")
        assert await answer.head()
        assert (answer.status, answer.headers["x-one"]) == (200, "a")
        answer.close()


async def test_an_answer_before_the_body_was_read_ends_the_connection(http: HttpClient) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK.replace(b"200 OK", b"413 No"))
        await writer.drain()
        await asyncio.sleep(0.05)

    async with runtime(serve) as url:
        for _ in range(2):
            assert await ask(http, url, b"x" * 2**24) == (413, b"ok")


async def test_silence_is_given_up_and_patience_can_end_earlier_without_harm(http: HttpClient) -> None:
    async with runtime(scripted(b"", then=5.0)) as url:
        answer = await http.send(url, "POST", "/", {}, b"")
        began_s = time.monotonic()
        assert not await answer.head(0.05)
        with pytest.raises(ReadTimeoutError):
            await answer.head()
        assert 0.9 < time.monotonic() - began_s < 4.0
        answer.close()


async def test_a_runtime_that_sends_slower_than_the_timeout_in_all_is_not_given_up(http: HttpClient) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await one_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        for _ in range(6):
            await asyncio.sleep(0.25)
            writer.write(b"x")

    async with runtime(serve) as url:
        assert await ask(http, url) == (200, b"xxxxxx")


async def test_no_more_is_taken_than_is_read(http: HttpClient) -> None:
    size, written = 64 * 2**20, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await one_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while written < size:
            writer.write(bytes(2**16))
            await writer.drain()
            written += 2**16

    async with runtime(serve) as url:
        answer = await http.send(url, "POST", "/", {}, b"")
        assert await answer.head()
        await asyncio.sleep(1.3)  # longer than the read timeout, which is not the runtime's fault
        assert written < size // 2
        total = 0
        while data := await answer.read():
            assert len(data) <= BUFFER_BYTES + 2**18
            total += len(data)
        assert total == size
        answer.close()


async def test_what_arrives_is_taken_without_its_reader_only_while_the_reader_waits_for_it() -> None:
    class Idle:
        def resume(self) -> None: ...

        def drop(self) -> None: ...

    taken: list[bytes] = []
    takes = True
    response = HttpResponse(Idle(), asyncio.get_running_loop(), 1.0, set())
    response.take = lambda data: takes and not taken.append(data)
    response.begun(200)
    response.arrived([b"a"])
    assert taken == []
    assert await response.read() == b"a"

    async def waiting() -> asyncio.Task[bytes]:
        made = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        return made

    reading = await waiting()
    response.arrived([b"b", b"c"])
    await asyncio.sleep(0)
    assert (taken, reading.done()) == ([b"bc"], False)
    takes = False
    response.arrived([b"d"])
    takes = True
    response.arrived([b"e"])  # it must not overtake
    assert (await reading, taken) == (b"de", [b"bc"])
    reading = await waiting()
    reading.cancel()
    response.arrived([b"f"])
    await asyncio.gather(reading, return_exceptions=True)
    assert (await response.read(), taken) == (b"f", [b"bc"])
    reading = await waiting()
    response.completed([b"g"])  # the reader learns of the end with the last part
    assert (await reading, response.is_complete, await response.read(), taken) == (b"g", True, b"", [b"bc"])


async def test_a_body_beyond_its_bound_is_none_and_cut(http: HttpClient) -> None:
    async with runtime(scripted(OK, OK)) as url:
        answer = await http.send(url, "POST", "/", {}, b"")
        await answer.head()
        assert await answer.read_all(1) is None
        answer.close()


async def test_closing_an_answer_under_way_closes_its_connection(http: HttpClient) -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await one_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        try:
            await reader.read()
        finally:
            gone.set()

    async with runtime(serve) as url:
        answer = await http.send(url, "POST", "/", {}, b"")
        await answer.head()
        answer.close()
        async with asyncio.timeout(1):
            await gone.wait()


async def test_a_header_with_a_line_end_is_refused_and_nobody_listening_is_an_error(http: HttpClient) -> None:
    with pytest.raises(ValueError, match="line end"):
        await http.send("http://127.0.0.1:9", "POST", "/", {"X-A": "1\r\nX-B: 2"}, b"")
    with pytest.raises(ConnectError):
        await http.send("http://127.0.0.1:9", "POST", "/", {}, b"")
