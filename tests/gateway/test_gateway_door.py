"""What a client can cost the gateway before a runtime sees anything: bodies, compression, heads, connections, lists."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import aiohttp
import pytest
from fakes import FakeRuntime
from gateway_world import KEY, OTHER_KEY, World, adapter_object, api_key, base_object, until, until_it, world
from hypothesis import given
from hypothesis import strategies as st

from lorapool_api.openai import InvalidRequestError, TooManyRequestsError
from lorapool_api.protocol import USAGE_COMMENT, Usage
from lorapool_gateway import connections
from lorapool_gateway.requests.body import BodyBudget, HeldBody
from lorapool_gateway.requests.request import parse_request
from lorapool_gateway.requests.sse import WholeAnswer
from lorapool_gateway.routing.auth import KeyTable
from lorapool_gateway.routing.model_lists import ModelLists
from lorapool_gateway.routing.objects import adapter_route, base_route
from lorapool_gateway.routing.routes import RouteTable
from lorapool_gateway.settings import Settings
from lorapool_runtime.openai.json_body import parse_json_object

MIB = 2**20
AUTH = f"Authorization: Bearer {KEY}\r\n"
BODY = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'


@asynccontextmanager
async def connected(here: World) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = here.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


def head(*lines: str, auth: str = AUTH) -> bytes:
    rest = "".join(f"{line}\r\n" for line in lines)
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{auth}{rest}\r\n".encode()


async def sent(here: World, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first answer to raw bytes."""
    async with connected(here) as (reader, writer):
        writer.write(data)
        return await answer(reader)


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(20):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(lines[0].split()[1]), headers, body


def code_of(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


def padded(size: int) -> bytes:
    """A request for `tiny` of this size."""
    start, end = b'{"model":"tiny","messages":[{"role":"user","content":"', b'"}]}'
    return start + b"x" * (size - len(start) - len(end)) + end


# --- bodies ---------------------------------------------------------------------------------


async def test_the_bodies_that_a_key_lets_the_gateway_hold_are_bounded_and_other_keys_are_served() -> None:
    budget = {"max_body_bytes": MIB, "max_held_body_bytes_per_key": 4 * MIB}
    async with world(**budget) as here, FakeRuntime().running() as runtime, asyncio.TaskGroup() as group:
        here.keys.publish(KeyTable.of([api_key(KEY), api_key(OTHER_KEY)]))
        here.base(coldStart={"maxWait": "5m", "maxQueued": 256})
        held = [group.create_task(here.post(padded(MIB))) for _ in range(4)]
        await until(lambda: here.sample("held_requests", base="demo/tiny") == 4)
        assert here.sample("held_body_bytes") == 4 * MIB
        refused = await here.post(padded(MIB))
        assert refused.status == 429
        assert (await refused.json())["error"]["code"] == "key_bodies_exceeded"
        assert refused.headers["Retry-After"] == "1"
        other = group.create_task(here.post(padded(MIB), headers={"Authorization": f"Bearer {OTHER_KEY}"}))
        await until(lambda: here.sample("held_requests", base="demo/tiny") == 5)
        here.replica(runtime)
        assert [(await task).status for task in (*held, other)] == [200] * 5
        assert here.sample("held_body_bytes") == 0


async def test_what_a_client_declares_counts_before_it_sends_it_and_until_it_leaves() -> None:
    async with world(max_body_bytes=MIB, max_held_body_bytes=MIB) as here:
        here.base()
        async with connected(here) as (_, writer):
            writer.write(head(f"Content-Length: {MIB}"))
            await until(lambda: here.sample("held_body_bytes") == MIB)
            status, _, body = await sent(here, head(f"Content-Length: {MIB}"))
            assert (status, code_of(body)) == (429, "bodies_exceeded")
        await until(lambda: here.sample("held_body_bytes") == 0)


async def test_a_body_without_a_length_counts_as_it_arrives() -> None:
    async with world(max_body_bytes=MIB, max_held_body_bytes=MIB) as here, connected(here) as (_, writer):
        writer.write(head("Transfer-Encoding: chunked") + b"a\r\n0123456789\r\n")
        await until(lambda: here.sample("held_body_bytes") == 10)
        writer.write(b"5\r\n01234\r\n")
        await until(lambda: here.sample("held_body_bytes") == 15)


async def test_a_body_is_dropped_once_a_runtime_has_accepted_the_request() -> None:
    runtime = FakeRuntime(words=50, token_s=0.05)
    async with runtime.running(), world() as here, here.client() as client:
        here.base()
        here.replica(runtime)
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        await anext(aiter(stream))
        assert here.gateway.in_flight == 1
        assert here.sample("held_body_bytes") == 0
        await stream.close()


def test_a_budget_counts_each_key_and_all_together_and_dropping_twice_gives_back_once() -> None:
    budget = BodyBudget(in_all=10, per_key=6)
    one, other = HeldBody(budget, "one"), HeldBody(budget, "other")
    one.reserve(6)
    with pytest.raises(TooManyRequestsError, match="one API key"):
        one.reserve(1)
    other.reserve(4)
    with pytest.raises(TooManyRequestsError, match="The gateway holds"):
        other.reserve(1)
    one.drop()
    one.drop()
    assert budget.held == 4
    other.reserve(2)


def test_settings_with_which_no_request_could_have_the_longest_body_are_refused() -> None:
    with pytest.raises(ValueError, match="max_body_bytes"):
        Settings(keys_namespace="lorapool", max_body_bytes=8 * MIB, max_held_body_bytes_per_key=4 * MIB)


# --- compression and authentication ---------------------------------------------------------


@pytest.mark.parametrize(("auth", "status"), [(AUTH, 415), ("", 401)])
async def test_a_compressed_body_is_never_decompressed(auth: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def decompress(*_: object, **__: object) -> None:
        raise AssertionError("decompressed")

    monkeypatch.setattr("aiohttp.compression_utils.ZLibDecompressor.__init__", decompress)
    bomb = gzip.compress(b"x" * 1_000_000)
    async with world() as here:
        here.base()
        lines = ("Content-Encoding: gzip", f"Content-Length: {len(bomb)}")
        found, _, body = await sent(here, head(*lines, auth=auth) + bomb)
        assert found == status
        if status == 415:
            assert code_of(body) == "unsupported_encoding"
            assert "without `Content-Encoding`" in json.loads(body)["error"]["message"]


async def test_a_request_without_a_key_is_refused_before_its_body_is_read() -> None:
    async with world() as here:
        status, headers, _ = await sent(here, head("Content-Length: 4000000", auth=""))
        assert status == 401
        assert "server" not in headers
        assert here.sample("held_body_bytes") == 0


# --- reading the body -----------------------------------------------------------------------


def read(raw: bytes) -> tuple[str, bool]:
    body = HeldBody(BodyBudget(MIB, MIB), "key")
    body.data = raw
    request = parse_request("/v1/completions", body, "tenant")
    return request.model, request.stream


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"a","model":"b","stream":true,"stream":false}',
        b'{"stream":false,"model":"b","x":{"model":"c","stream":true},"y":[{"model":"d"}]}',
        b'{"\\u006dodel":"a","model":"\\u0062"}',
        b' \n{"x":123456789012345678901234567890,"y":1e999,"model":"b"}\t',
        '{"model":"b","x":"\u00e9\U0001f600"}'.encode(),
    ],
)
def test_the_last_field_of_a_name_counts_at_the_top_level_only(raw: bytes) -> None:
    assert read(raw) == ("b", False)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"model":"a"', "not valid JSON"),
        (b'{"model":"a"} x', "not valid JSON"),
        (b'{"model":"a","x":NaN}', "not valid JSON"),
        (b'{"model":"\xff"}', "not valid JSON"),
        ('{"model":"a"}'.encode("utf-16"), "not valid JSON"),
        (b'["model","a"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"model":["a"]}', "`model` is required"),
        (b'{"x":1}', "`model` is required"),
        (b'{"model":"' + b"a" * 257 + b'"}', "longer than 256"),
        (b'{"model":[' + b"1," * 100_000 + b"1]}", "longer than 256"),
        (b'{"model":"a","stream":1}', "`stream` must be"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read(raw)


NAMES = ['"model"', '"mod\\u0065l"', '"stream"', '"\\u0073tream"', '"Model"', '"model\\u0000"', '"messages"', '""']
VALUES = [
    "true", "false", "null", "1", "1e999", "NaN", "-Infinity", '"a"', '"b\\u0062"', '"\\ud800"', '"\\ud83d\\ude00"',
    '"\u00e9"', "[]", '{"model":"inner","stream":true}', "[" * 40 + "]" * 40, "1" * 5000,
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("model"), inner, max_size=3),
    max_leaves=8,
).map(json.dumps)
FIELDS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | JSON), max_size=6)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Objects with repeated and escaped names, in several encodings, some with bytes replaced."""
    space = draw(st.sampled_from(["", " ", "\n\t", "\ufeff", "\x00"]))
    fields = [('"model"', '"first"'), *draw(FIELDS)]
    text = space + "{" + ",".join(f"{name}{space}:{value}" for name, value in fields) + "}" + space
    raw = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])))
    for at, new in draw(st.lists(st.tuples(st.integers(0, len(raw)), st.binary(max_size=3)), max_size=2)):
        raw = raw[:at] + new + raw[at + len(new) :]
    return raw


@given(bodies())
def test_whatever_the_gateway_reads_the_runtime_reads_the_same_or_refuses(raw: bytes) -> None:
    try:
        model, stream = read(raw)
        fields = parse_json_object(raw, constants=True)
    except InvalidRequestError:
        return
    assert fields["model"] == model
    assert fields.get("stream") in ((True,) if stream else (False, None))


# --- heads and connections ------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n",
        b"one two three four\r\n\r\n",
        head("X-A: " + "y" * 9000),
        head("X A: 1"),
        head("X-A: a\x00b"),
        head(*(f"X-{number}: 1" for number in range(600))),
        head("Content-Length: 6", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("Content-Length: 5", "Content-Length: 6") + b"123456",
        head("Content-Length: +5") + b"12345",
        head("Transfer-Encoding: xchunked") + b"0\r\n\r\n",
        head("Transfer-Encoding: chunked") + b"no hex\r\n",
    ],
)
async def test_what_is_not_http_is_a_plain_400_that_leaves_no_traceback_and_names_no_software(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with world() as here:
            here.base()
            status, headers, body = await sent(here, data)
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "server" not in headers
    assert not any(record.exc_info for record in caplog.records)


async def test_no_answer_names_the_servers_software() -> None:
    async with FakeRuntime().running() as runtime, world() as here:
        here.base()
        here.replica(runtime)
        for body in (here.ask("tiny"), here.ask("tiny", stream=True), here.ask("nope"), b"{"):
            assert "Server" not in (await here.post(body)).headers
        assert "Server" not in (await here.post(b"", path="/nothing")).headers


async def test_a_head_that_does_not_end_in_time_closes_the_connection_and_an_idle_one_stays() -> None:
    async with world(head_timeout_s=0.2) as here, connected(here) as idle, connected(here) as (reader, writer):
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nX-A: ")
        async with asyncio.timeout(20):
            while not reader.at_eof() and not writer.is_closing():  # closed by the gateway, or reset
                writer.write(b"y")  # one byte after the other does not prolong it
                await asyncio.sleep(0.02)
        idle[1].write(head("Content-Length: 0"))
        status, _, _ = await answer(idle[0])
        assert status == 400
        idle[1].write(b"GET /v1/mod")
        assert await asyncio.wait_for(idle[0].read(), 20) == b""


async def test_a_connection_that_never_sends_anything_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEEPALIVE_S", 0.05)
    async with world() as here, connected(here) as (reader, _):
        assert await asyncio.wait_for(reader.read(), 20) == b""


async def test_connections_are_bounded_by_address_and_one_more_is_told_why() -> None:
    async with world(max_connections_per_address=2) as here:
        async with connected(here) as one, connected(here) as other:
            for _, writer in (one, other):
                writer.write(head("Content-Length: 0"))
            for reader, _ in (one, other):
                assert (await answer(reader))[0] == 400
            status, headers, body = await sent(here, b"")
            assert (status, code_of(body), headers["connection"]) == (503, "too_many_connections", "close")
            assert here.sample("refused_connections_total") == 1

        async def admitted() -> bool:
            return (await sent(here, head("Content-Length: 0")))[0] == 400

        await until_it(admitted)


async def test_connections_are_bounded_in_all() -> None:
    async with world(max_connections=1) as here, connected(here) as (reader, writer):
        writer.write(head("Content-Length: 0"))
        assert (await answer(reader))[0] == 400
        assert (await sent(here, b""))[0] == 503


# --- long answers ---------------------------------------------------------------------------


async def test_a_whole_answer_of_more_than_64_mib_is_delivered_and_counted() -> None:
    async with FakeRuntime(words=68, filler="w" * MIB).running() as runtime, world() as here:
        here.base()
        here.replica(runtime)
        response = await here.post(here.ask("tiny"))
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("application/json")
        assert response.headers["x-lorapool-adapter"] == "base"
        text = (await response.json())["choices"][0]["message"]["content"]
        assert len(text) > 64 * MIB
        assert here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion") == 68
        assert here.sample("requests_total", base="demo/tiny", adapter="base", code="200") == 1


async def test_a_long_answer_that_breaks_off_is_no_complete_response_and_is_not_generated_again() -> None:
    async with FakeRuntime(words=8, filler="w" * MIB).running() as runtime, world() as here:
        here.base()
        here.replica(runtime)
        runtime.faults.die_mid_body = 1
        with pytest.raises(aiohttp.ClientPayloadError):
            await here.post(here.ask("tiny"))
        await until(lambda: here.sample("requests_total", base="demo/tiny", adapter="base", code="502") == 1)
        assert len(runtime.seen) == 1
        assert here.sample("tokens_total", base="demo/tiny", adapter="base", type="completion") == 8


@given(st.binary(max_size=40).filter(lambda data: b"\n" not in data), st.lists(st.integers(0, 120), max_size=6))
def test_a_whole_answer_taken_in_parts_is_the_answer(data: bytes, cuts: list[int]) -> None:
    wire = USAGE_COMMENT + b'{"prompt_tokens":1,"completion_tokens":2}\n' + b"data: " + data + b"\n\n"
    answer, taken = WholeAnswer(), b""
    edges = [0, *sorted(cuts), len(wire)]
    for start, end in pairwise(edges):
        answer.feed(wire[start:end])
        if answer.size:
            taken += answer.take()
    assert (answer.body(), taken) == (b"", data)
    assert answer.usage() == Usage(prompt_tokens=1, completion_tokens=2)


# --- the model list -------------------------------------------------------------------------


def table_of(adapters: int) -> RouteTable:
    routes = [adapter_route(adapter_object(f"a{number}")) for number in range(adapters)]
    return RouteTable.of([base_route(base_object())], routes, {})


def test_a_model_list_is_made_once_for_keys_that_see_the_same_until_an_object_changes() -> None:
    lists, table = ModelLists(), table_of(3)
    first = lists.body(table, api_key(KEY, "demo"))
    assert len(json.loads(first)["data"]) == 4
    assert lists.body(table, api_key(OTHER_KEY, "demo")) is first
    assert lists.body(dataclasses.replace(table, replicas={}), api_key(KEY, "demo")) is first
    assert json.loads(lists.body(table, api_key(KEY, "elsewhere")))["data"] == []
    assert len(json.loads(lists.body(table_of(4), api_key(KEY, "demo")))["data"]) == 5


def test_only_a_bounded_number_of_lists_is_kept() -> None:
    lists, table = ModelLists(), table_of(1)
    first = lists.body(table, api_key(KEY, "demo"))
    for number in range(16):
        lists.body(table, api_key(KEY, f"other-{number}"))
    assert lists.body(table, api_key(KEY, "demo")) is not first
