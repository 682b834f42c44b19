"""An unmodified OpenAI client at a warm gateway: responses, streams, model lists, one error of each class."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from fakes import FakeRuntime, digest_of
from gateway_world import KEY, OTHER_KEY, World, api_key, failed_status, key_of, until, world

from lorapool_api.protocol import HEADER_TENANT
from lorapool_gateway import connections
from lorapool_gateway.routing.auth import KeyTable

USER = [{"role": "user", "content": "where is my parcel"}]


@pytest.fixture
async def runtime():
    async with FakeRuntime().running() as fake:
        yield fake


@pytest.fixture
async def here(runtime: FakeRuntime):
    """One base with one runtime, and a loaded adapter demo/route."""
    async with world() as made:
        made.base(servedName="tiny-instruct")
        made.adapter("route", alias="router")
        runtime.have(key_of("route"), "demo/route")
        made.replica(runtime)
        yield made


async def test_a_chat_answer_names_the_adapter_and_digest_that_gave_it(here: World) -> None:
    async with here.client() as client:
        raw = await client.chat.completions.with_raw_response.create(model="demo/route", messages=USER)
    answer = raw.parse()
    assert answer.choices[0].message.content == f"demo/route@{digest_of('route')} heard where is my parcel"
    assert raw.headers["x-lorapool-adapter"] == f"demo/route@{digest_of('route')}"
    assert "x-lorapool-cold-start-ms" not in raw.headers
    assert raw.headers["x-request-id"].startswith("req-")
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)


async def test_a_runtime_sees_which_requests_are_of_one_tenant_and_nothing_of_the_key(
    here: World, runtime: FakeRuntime
) -> None:
    here.keys.publish(KeyTable.of([api_key(KEY), api_key(OTHER_KEY)]))
    for key in (KEY, OTHER_KEY, KEY):
        await here.post(here.ask("route"), headers={"Authorization": f"Bearer {key}"})
    tenants = [seen.headers[HEADER_TENANT] for seen in runtime.seen]
    assert tenants[0] == tenants[2] != tenants[1]
    assert all(re.fullmatch(r"[0-9a-f]{16}", tenant) for tenant in tenants)


@pytest.mark.parametrize("model", ["demo/route", "route", "router"])
async def test_an_adapter_answers_under_each_of_its_names(here: World, model: str) -> None:
    response = await here.post(here.ask(model))
    assert response.headers["x-lorapool-adapter"] == f"demo/route@{digest_of('route')}"


@pytest.mark.parametrize("model", ["demo/tiny", "tiny", "tiny-instruct"])
async def test_the_base_answers_under_its_own_names_only(here: World, runtime: FakeRuntime, model: str) -> None:
    response = await here.post(here.ask(model))
    assert response.headers["x-lorapool-adapter"] == "base"
    assert runtime.seen[-1].target == "base"


async def test_completions_work_with_and_without_stream(here: World) -> None:
    async with here.client() as client:
        whole = await client.completions.create(model="route", prompt="one two three")
        stream = await client.completions.create(model="route", prompt="one two three", stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
    assert whole.choices[0].text == "".join(pieces)


async def test_a_stream_carries_usage_only_when_the_client_asked(here: World) -> None:
    async with here.client() as client:
        with_usage = await client.chat.completions.create(
            model="route", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in with_usage]
        without = await client.chat.completions.create(model="route", messages=USER, stream=True)
        plain = [chunk async for chunk in without]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in plain)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in plain).startswith("demo/route@")


async def test_streamed_data_bytes_are_untouched_and_hold_no_comment(here: World) -> None:
    async with here.session.post(
        f"{here.url}/v1/chat/completions",
        json=here.ask("route", stream=True),
        headers={"Authorization": f"Bearer {KEY}"},
    ) as response:
        assert response.content_type == "text/event-stream"
        text = (await response.read()).decode()
    assert "lorapool-usage" not in text
    assert text.endswith("data: [DONE]\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert json.loads(events[0].removeprefix("data: "))["model"] == "route"


class Writes:
    """What is written to the gateway's clients, and the most that one transport has held back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[bytes] = []
        self.most_buffered = 0
        connect = connections._Connection.connection_made
        monkeypatch.setattr(
            connections._Connection,
            "connection_made",
            lambda protocol, transport: connect(protocol, _Spied(transport, self)),
        )


class _Spied:
    def __init__(self, transport: asyncio.Transport, writes: Writes) -> None:
        self._transport, self._writes = transport, writes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._transport.write(data)
        self._writes.parts.append(bytes(data))
        self._writes.most_buffered = max(self._writes.most_buffered, self._transport.get_write_buffer_size())


EVENT_STREAM = (
    b"HTTP/1.1 200 OK\r\nx-lorapool-adapter: base\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def streaming(*parts: bytes, pause_s: float = 0.0) -> AsyncIterator[World]:
    """One base with a runtime that sends these parts in answer to its first request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            await asyncio.sleep(pause_s)
            writer.write(part)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as runtime, world() as made:
        made.base()
        made.replica(f"http://127.0.0.1:{runtime.sockets[0].getsockname()[1]}")
        yield made


@pytest.mark.parametrize("apart", [False, True])
async def test_what_arrives_together_is_written_together_with_the_head_and_the_end(
    monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    written = Writes(monkeypatch).parts
    events = [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]
    parts = [EVENT_STREAM, *map(chunk, events)]
    parts[-1] += b"0\r\n\r\n"
    async with streaming(*(parts if apart else [b"".join(parts)]), pause_s=0.05) as made:
        response = await made.post(made.ask("tiny", stream=True))
        assert (await response.text()).encode() == b"".join(events)
    assert [part.count(b"data: ") for part in written] == ([1, 1, 1] if apart else [3])
    assert written[0].startswith(b"HTTP/1.1 200 ")
    assert written[-1].endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_does_not_read_for_a_while_receives_every_event_and_little_is_kept_for_it(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    writes, done = Writes(monkeypatch), b"data: [DONE]\n\n"
    events = [b"data: %d %b\n\n" % (number, b"x" * 8000) for number in range(4000)]
    cut = [b": lorapool-usage {}\n" + event for event in events]
    cut[50:51] = [cut[50][:9], cut[50][9:]]  # one event arrives in two parts
    async with streaming(EVENT_STREAM, *map(chunk, cut), chunk(done) + b"0\r\n\r\n") as made:
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        narrow.connect(("127.0.0.1", int(made.url.rsplit(":", 1)[1])))
        reader, writer = await asyncio.open_connection(sock=narrow)
        body = json.dumps(made.ask("tiny", stream=True))
        writer.write(
            f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        await until(lambda: writes.most_buffered)
        await asyncio.sleep(0.3)
        received = await reader.read()
        writer.close()
    assert (b"chunked" in head) == (version == "1.1")
    if version == "1.1":
        received = b"".join(re.split(rb"(?:\r\n|^)[0-9a-f]+\r\n", received)).removesuffix(b"\r\n")
    is_whole = received == b"".join(events) + done
    assert is_whole  # without a comparison of 32 MB by pytest
    assert writes.most_buffered < 2**20


async def test_the_body_reaches_the_runtime_byte_for_byte_and_client_headers_do_not(
    here: World, runtime: FakeRuntime
) -> None:
    body = b'{"model": "route",\n  "messages": [{"role":"user","content":"\\u00e9"}], "x": 1.0}'
    await here.post(body, headers={"x-lorapool-adapter": "base", "x-lorapool-usage": "0", "x-evil": "1"})
    seen = runtime.seen[-1]
    assert seen.body == json.loads(body)
    assert seen.target == str(key_of("route"))
    assert seen.headers["x-lorapool-usage"] == "1"
    assert "x-evil" not in seen.headers
    assert KEY not in str(seen.headers)


async def test_the_model_list_shows_bases_and_adapters_with_their_parent(here: World) -> None:
    async with here.client() as client:
        listed = [model async for model in client.models.list()]
        one = await client.models.retrieve("demo/route")
        by_alias = await client.models.retrieve("router")
    assert [model.id for model in listed] == ["demo/tiny", "tiny-instruct", "demo/route", "router"]
    assert (one.id, one.owned_by, one.created) == ("demo/route", "demo", 1767225600)
    assert one.model_extra == {"root": "demo/route", "parent": "demo/tiny", "max_model_len": 2048}
    assert (by_alias.id, by_alias.model_extra) == ("router", one.model_extra)
    assert [model.id for model in listed if model.model_extra == one.model_extra] == ["demo/route", "router"]


async def test_the_model_list_shows_an_alias_only_where_it_leads(here: World) -> None:
    here.adapter("younger", alias="router", alias_granted=False)
    here.adapter("hidden", alias="route", alias_granted=False, created="2025-01-01T00:00:00Z")
    async with here.client() as client:
        listed = [model.id async for model in client.models.list()]
    assert listed == ["demo/tiny", "tiny-instruct", "demo/hidden", "demo/route", "router", "demo/younger"]


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, "Bearer \udcff"])
async def test_without_a_known_key_every_route_answers_401(here: World, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")):
        async with here.session.request(method, here.url + path, headers=headers) as response:
            error = (await response.json())["error"]
        assert (response.status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")


async def test_unknown_forbidden_and_ungranted_models_are_one_and_the_same_404(here: World) -> None:
    here.keys.publish(KeyTable.of([api_key(KEY), api_key(OTHER_KEY, "team-b")]))
    here.adapter("theirs", namespace="team-b", base="tiny", base_namespace="demo")  # demo/tiny does not list team-b
    answers = set()
    async with here.client(OTHER_KEY) as client:
        for model in ("team-b/nothing", "demo/route", "demo/tiny", "team-b/theirs", "router", "tiny-instruct"):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model=model, messages=USER)
            body = caught.value.body
            assert isinstance(body, dict)
            answers.add((body["code"], body["type"], body["message"].replace(model, "M")))
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve(model)
        assert [model async for model in client.models.list()] == []
    assert len(answers) == 1
    assert next(iter(answers))[0] == "model_not_found"


async def test_a_granted_namespace_may_use_the_base_and_loses_it_with_the_grant(
    here: World, runtime: FakeRuntime
) -> None:
    here.keys.publish(KeyTable.of([api_key(KEY, "team-b")]))
    here.base(access={"namespaces": ["team-b"]})
    key = here.adapter("theirs", namespace="team-b", base="tiny", base_namespace="demo")
    runtime.have(key, "team-b/theirs")
    assert (await here.post(here.ask("theirs"))).status == 200
    here.base(access={"namespaces": []})
    assert (await here.post(here.ask("theirs"))).status == 404


async def test_a_revoked_key_is_refused_by_the_next_request(here: World) -> None:
    assert (await here.post(here.ask("route"))).status == 200
    here.keys.publish(KeyTable.of([]))
    assert (await here.post(here.ask("route"))).status == 401


async def test_a_key_has_at_most_its_own_number_of_requests_under_way(here: World, runtime: FakeRuntime) -> None:
    here.keys.publish(KeyTable.of([api_key(KEY, max_in_flight=2)]))
    runtime.token_s = 0.05
    answers = await asyncio.gather(*(here.post(here.ask("route")) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status == 429)
    assert (await refused.json())["error"]["code"] == "key_in_flight_exceeded"
    assert refused.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"{not json", 400, None, "not valid JSON"),
        (b'{"model": "route"', 400, None, "truncated"),
        (b'{"model": nope}', 400, None, "byte 11"),
        (b"\xff\xfe", 400, None, "JSON"),
        (b"[1, 2]", 400, None, "JSON object"),
        (b'{"model":' + b"[" * 100_000, 400, None, "nested too deeply"),
        (b"{}", 400, "model", "`model` is required"),
        (b'{"model": 3}', 400, "model", "string"),
        (b'{"model": "route", "stream": "yes"}', 400, "stream", "true or false"),
        (b'{"model": "' + b"m" * 300 + b'"}', 400, "model", "256"),
        (b'{"model": "route", "pad": "' + b"x" * (4 * 2**20) + b'"}', 413, None, "4194304"),
    ],
)
async def test_a_bad_body_is_refused_naming_what_is_wrong(
    here: World, body: bytes, status: int, param: str | None, words: str
) -> None:
    response = await here.post(body)
    error = (await response.json())["error"]
    assert (response.status, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]


async def test_a_chunked_body_beyond_the_bound_is_refused_without_a_length(here: World) -> None:
    async def endless():
        for _ in range(80):
            yield b"x" * 65536

    headers = {"Authorization": f"Bearer {KEY}"}
    async with here.session.post(f"{here.url}/v1/chat/completions", data=endless(), headers=headers) as response:
        assert response.status == 413


async def test_the_runtimes_own_refusal_reaches_the_client_as_it_is(here: World) -> None:
    async with here.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="route", messages=USER, temperature=-1)
    assert caught.value.param == "temperature"


async def test_unknown_paths_and_methods_get_openai_shaped_errors(here: World) -> None:
    async with here.session.get(f"{here.url}/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"]["code"] == "method_not_allowed"
    async with here.session.post(f"{here.url}/v1/embeddings", json={}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"


async def test_a_harmless_request_id_is_echoed_and_a_strange_one_replaced(here: World, runtime: FakeRuntime) -> None:
    response = await here.post(here.ask("route"), headers={"x-request-id": "trace-1"})
    assert response.headers["x-request-id"] == "trace-1"
    assert runtime.seen[-1].headers["x-request-id"] == "trace-1"
    response = await here.post(here.ask("nope"), headers={"x-request-id": "a b\tc" * 50})
    assert response.headers["x-request-id"].startswith("req-")


async def test_adapter_states_become_the_matching_errors(here: World) -> None:
    here.adapter("big", status=failed_status("RankTooHigh", "adapter rank 64 > BaseModel maxRank 16; re-train"))
    here.adapter("paused", suspend=True)
    here.adapter("orphan", base="gone")
    expected = {
        "big": (422, "rank_too_high", "maxRank 16"),
        "paused": (422, "adapter_suspended", "spec.suspend"),
        "orphan": (503, "base_not_found", "demo/gone"),
    }
    for model, (status, code, words) in expected.items():
        response = await here.post(here.ask(model))
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (status, code)
        assert words in error["message"]
        assert ("Retry-After" in response.headers) == (status == 503)


async def test_an_answer_of_another_identity_is_withheld(here: World, runtime: FakeRuntime) -> None:
    runtime.faults.wrong_identity = f"demo/other@{digest_of('other')}"
    for stream in (False, True):
        response = await here.post(here.ask("route", stream=stream))
        text = await response.text()
        assert response.status == 500
        assert json.loads(text)["error"]["code"] == "wrong_adapter"
        assert "heard" not in text


async def test_a_wrong_runtime_token_is_no_answer_to_the_client(here: World, runtime: FakeRuntime) -> None:
    here.base(coldStart={"maxWait": "0s"})
    runtime.token = "z" * 64
    response = await here.post(here.ask("route"))
    assert response.status == 503
    assert (await response.json())["error"]["code"] == "cold_start_timeout"


async def test_a_runtime_that_only_knows_the_previous_token_answers_during_a_rotation(
    here: World, runtime: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    here.tokens = ("n" * 64, runtime.token)
    assert (await here.post(here.ask("route"))).status == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    here.tokens = (runtime.token, "o" * 64)
    assert (await here.post(here.ask("route"))).status == 200


async def test_names_that_clients_invent_are_refused_from_memory_and_add_no_series(
    here: World, runtime: FakeRuntime
) -> None:
    await here.post(here.ask("guess"))
    before = len(here.metrics.text().splitlines())
    for batch in range(20):
        names = [f"guess-{batch}-{number}" for number in range(50)]
        assert {answer.status for answer in await asyncio.gather(*(here.post(here.ask(n)) for n in names))} == {404}
    assert len(here.metrics.text().splitlines()) == before
    assert here.sample("requests_total", base="__unknown__", adapter="__unknown__", code="404") == 1001
    assert runtime.seen == []


async def test_a_client_that_waits_for_100_continue_receives_it(here: World) -> None:
    body = json.dumps(here.ask("route", text="word " * 1000)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(here.url.rsplit(":", 1)[1]))
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
    )
    async with asyncio.timeout(2):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_the_model_list_answers_head_without_a_body(here: World) -> None:
    async with here.session.head(f"{here.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}) as response:
        assert (response.status, await response.read()) == (200, b"")
