"""The gateway speaks TLS to runtimes that serve it, to those of the right base alone, and HTTP to the others."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import string
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import uvloop
from authority_kit import BASE_UID, Tls, authority, serve_with
from fakes import FakeRuntime
from gateway_world import until, world
from pods import pod_object

from lorapool_api.pod_address import AUTHORITY, server_name
from lorapool_api.trust.tls import ReleaseTrust, ServerCertificate
from lorapool_gateway.requests.http_client import HttpClient
from lorapool_gateway.requests.http_response import ConnectError
from lorapool_gateway.routing.objects import runtime_pod
from lorapool_gateway.routing.runtime_polls import PolledPod, RuntimePolls

NAME = server_name(BASE_UID)


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return Tls(tmp_path)


class Counted:
    """A server that answers ok and counts its connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.url = ""

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def running(self, context: ssl.SSLContext | None) -> AsyncIterator[Counted]:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, ssl=context)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            await asyncio.sleep(0.01)


@asynccontextmanager
async def client(trust: ReleaseTrust) -> AsyncIterator[HttpClient]:
    made = HttpClient(trust=trust, read_timeout_s=5.0)
    try:
        yield made
    finally:
        await made.close()
        await asyncio.sleep(0.05)  # TLS connections close a moment after


async def ask(http: HttpClient, url: str, body: bytes = b"{}", name: str = NAME) -> bytes | None:
    response = await http.send(url, "POST", "/", {}, body, name=name)
    try:
        await response.head()
        return await response.read_all(1000)
    finally:
        response.close()


def test_the_port_of_a_pod_says_whether_it_serves_tls() -> None:
    pods = [runtime_pod(pod_object(8000, ip="10.0.0.1", scheme=scheme)) for scheme in ("http", "https", "grpc")]
    assert [pod and pod.endpoint.url for pod in pods] == ["http://10.0.0.1:8000", "https://10.0.0.1:8000", None]
    assert pods[1] is not None
    assert pods[1].endpoint.server_name == "base-demo-tiny.runtimes.lorapool.internal"


async def test_requests_of_any_size_share_one_tls_connection(tls: Tls) -> None:
    async with Counted().running(tls.server().context) as runtime, client(tls.trust()) as http:
        for size in (2, 100_000, 4 * 2**20, 2):
            assert await ask(http, runtime.url, b"x" * size) == b"ok"
        assert runtime.connections == 1


@pytest.mark.parametrize("encrypted", [False, True])
def test_responses_that_arrive_at_the_same_time_are_kept_apart_on_the_gateways_event_loop(
    tls: Tls, encrypted: bool
) -> None:
    """They are read into one buffer, one after another."""
    letters = string.ascii_letters.encode()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        letter = await reader.readexactly(1)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for size in (1, 100, 20_000, 300_000, 1000):
            writer.write(b"%x\r\n%b\r\n" % (size, letter * size))
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")
        writer.close()

    async def ask_all() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=tls.server().context if encrypted else None)
        url = f"{'https' if encrypted else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, client(tls.trust()) as http:

            async def read(letter: bytes) -> None:
                response = await http.send(url, "POST", "/", {}, letter, name=NAME)
                await response.head()
                assert await response.read_all(2**20) == letter * 321_101
                response.close()

            await asyncio.gather(*(read(letters[number : number + 1]) for number in range(len(letters))))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask_all())


@pytest.mark.parametrize(
    ("case", "check"),
    [
        ("of another authority", "not signed by an authority of this release"),
        ("of another base", "not one of this base"),
        ("expired", "has expired"),
        ("without a trusted authority", "is missing"),
        ("plain HTTP", "TLS handshake failed"),
    ],
)
async def test_a_runtime_that_fails_a_check_is_sent_nothing_and_the_error_names_the_check(
    tls: Tls, case: str, check: str
) -> None:
    served = tls.server(age_days=100 if case == "expired" else 0)
    if case == "of another authority":
        served = ServerCertificate(serve_with(tls.root / "foreign", authority(tls.root / "theirs")))
    if case == "without a trusted authority":
        tls.ca_file.unlink()
    if case == "of another base":
        served = tls.server("other-uid")
    received = FakeRuntime(tls=None if case == "plain HTTP" else served.context)
    async with received.running(), client(tls.trust()) as http:
        with pytest.raises(ConnectError, match=check) as error:
            await ask(http, received.url.replace("http:", "https:"))
        assert "PRIVATE" not in str(error.value)
    assert received.seen == received.authorizations == []


async def test_a_renewed_certificate_is_served_from_the_next_connection_on(tls: Tls, tmp_path: Path) -> None:
    served = tls.server()
    serials = []
    async with Counted().running(served.context) as runtime:
        port = int(runtime.url.rsplit(":", 1)[1])
        for renewed in (False, True, False):
            if renewed:
                serve_with(tmp_path / "served", tls.issuer)
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=tls.trust().context(), server_hostname=NAME
            )
            serials.append(writer.get_extra_info("peercert")["serialNumber"])
            writer.close()
    assert serials[0] != serials[1] == serials[2]


async def test_a_broken_renewal_keeps_the_certificate_that_was_served(
    tls: Tls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Counted().running(tls.server().context) as runtime, client(tls.trust()) as http:
        (tmp_path / "served" / "tls.crt").write_text("no certificate")
        assert await ask(http, runtime.url) == b"ok"
        await http.close()
    assert caplog.text.count("cannot use the renewed certificate") == 1


async def test_an_authority_is_replaced_without_a_refused_request(tls: Tls, tmp_path: Path) -> None:
    new = authority(tmp_path / "new")
    both = tls.ca_file.read_bytes() + (tmp_path / "new" / AUTHORITY).read_bytes()
    async with Counted().running(tls.server().context) as runtime, client(tls.trust()) as http:
        assert await ask(http, runtime.url) == b"ok"
        tls.ca_file.write_bytes(both)  # first trusted in addition
        assert await ask(http, runtime.url) == b"ok"
        serve_with(tmp_path / "served", new)  # then used
        assert await ask(http, runtime.url) == b"ok"
        shutil.copy(tmp_path / "new" / AUTHORITY, tls.ca_file)  # then trusted alone
        assert await ask(http, runtime.url) == b"ok"
        serve_with(tmp_path / "served", tls.issuer)
        tls.ca_file.touch()
        with pytest.raises(ConnectError, match="not signed by an authority"):
            await ask(http, runtime.url)


async def test_a_connection_made_under_a_former_trust_is_not_used_again(tls: Tls, tmp_path: Path) -> None:
    authority(tmp_path / "new")
    async with Counted().running(tls.server().context) as runtime, client(tls.trust()) as http:
        assert await ask(http, runtime.url) == b"ok"
        shutil.copy(tmp_path / "new" / AUTHORITY, tls.ca_file)
        with pytest.raises(ConnectError, match="not signed by an authority"):
            await ask(http, runtime.url)


async def test_an_authority_that_cannot_be_read_changes_nothing(tls: Tls, caplog: pytest.LogCaptureFixture) -> None:
    async with Counted().running(tls.server().context) as runtime, client(tls.trust()) as http:
        tls.ca_file.write_text("no certificate")
        for _ in range(3):
            assert await ask(http, runtime.url) == b"ok"
    assert caplog.text.count("cannot read the trusted authorities") == 1


async def test_plain_and_encrypted_pods_of_one_base_both_serve(tls: Tls) -> None:
    plain, encrypted = FakeRuntime(), FakeRuntime(tls=tls.server().context)
    async with plain.running(), encrypted.running(), world(trust=tls.trust()) as made:
        made.base()
        for pod, runtime in (("pod-a", plain), ("pod-b", encrypted)):
            made.gone()
            made.gone("pod-b")
            made.replica(runtime, pod)
            assert (await made.post(made.ask("tiny"))).status == 200
            async with made.client() as openai:
                stream = await openai.chat.completions.create(**made.ask("tiny", stream=True))
                assert len([chunk async for chunk in stream]) > 1
        assert len(plain.seen) == len(encrypted.seen) == 2


async def test_no_request_is_lost_while_tls_is_switched_on_and_off_and_on(tls: Tls) -> None:
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(world(trust=tls.trust()))
        made.base()
        statuses: list[int] = []
        over = False

        async def ask_all_the_time() -> None:
            while not over:
                statuses.append((await made.post(made.ask("tiny"))).status)

        old, asking = "", []
        for number, encrypted in enumerate((False, True, False, True)):  # a rollout: the new pod, then without the old
            runtime = FakeRuntime(tls=tls.server().context if encrypted else None)
            await stack.enter_async_context(runtime.running())
            made.replica(runtime, f"pod-{number}")
            made.gone(old)
            old, asking = f"pod-{number}", asking or [asyncio.create_task(ask_all_the_time()) for _ in range(4)]
            await until(lambda runtime=runtime: len(runtime.seen) >= 10)
        over = True
        await asyncio.gather(*asking)
        assert set(statuses) == {200}, statuses


async def test_a_client_that_leaves_ends_its_generation_over_tls_too(tls: Tls) -> None:
    runtime = FakeRuntime(tls=tls.server().context, token_s=0.02, words=500)
    async with runtime.running(), world(trust=tls.trust()) as made:
        made.base()
        made.replica(runtime)
        async with made.client() as openai:
            stream = await openai.chat.completions.create(**made.ask("tiny", stream=True))
            async for _ in stream:
                break
            await stream.close()
        await until(lambda: runtime.seen[0].cancelled)
        assert runtime.seen[0].completion_tokens < 500


async def test_a_pod_is_polled_over_tls_and_one_that_is_not_trusted_is_reported_once(
    tls: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ours = FakeRuntime(tls=tls.server().context)
    other = ServerCertificate(serve_with(tls.root / "other", tls.issuer, "other-uid"))
    theirs = FakeRuntime(tls=other.context)
    async with ours.running(), theirs.running(), aiohttp.ClientSession() as session:
        polls = RuntimePolls(session, lambda uid: ("t" * 64,), lambda: None, tls.trust())
        pods = {name: PolledPod(runtime.url, BASE_UID, "demo/tiny") for name, runtime in (("a", ours), ("b", theirs))}
        polls.follow(pods)
        await until(lambda: "a" in polls.states and "b" in polls.failed)
        known = ours.polls
        ours.change()
        await until(lambda: ours.polls > known)
        assert polls.proven == {"a"}
        await polls.close()
    await asyncio.sleep(0.05)
    refused = [record for record in caplog.records if record.message == "runtime is not trusted"]
    assert [(record.base, "not one of this base" in record.error) for record in refused] == [("demo/tiny", True)]  # type: ignore[attr-defined]
    assert theirs.authorizations == []
