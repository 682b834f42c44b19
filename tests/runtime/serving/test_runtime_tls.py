"""The runtime over TLS: it does not start without a certificate, and streams, leaving clients and probes work."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import aiohttp
import pytest
from authority_kit import BASE_UID, Tls
from fakes_runtime import FakeEngine, serving, settings_for_tests, until
from runtime_process import free_port

from lorapool_api.pod_address import server_name
from lorapool_runtime.__main__ import _listening, main
from lorapool_runtime.serving.service import Runtime

NAME = server_name(BASE_UID)
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("what", ["missing", "another key", "no certificate"])
def test_without_a_usable_certificate_the_runtime_says_so_and_serves_nothing(
    tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, port = tmp_path / "served", free_port()
    Tls(tmp_path).server()
    if what == "missing":
        (folder / "tls.key").unlink()
    elif what == "another key":
        (folder / "tls.key").write_bytes((tmp_path / "ours" / "tls.key").read_bytes())
    else:
        (folder / "tls.crt").write_text("")
    listened: list[object] = []
    monkeypatch.setattr(socket.socket, "listen", lambda *a: listened.append(a))
    assert main(["--model", "/none", "--tls-dir", str(folder), "--listen-port", str(port)]) == 2
    assert f"the certificate in {folder} cannot be used" in capfd.readouterr().err
    assert listened == []


async def test_requests_are_served_over_tls_alone_and_probes_stay_plain(tmp_path: Path) -> None:
    tls = Tls(tmp_path)
    tls.server()
    port, metrics_port = free_port(), free_port()
    settings = settings_for_tests(listen_port=port, metrics_port=metrics_port, tls_dir=tmp_path / "served")
    async with _listening(Runtime(settings)), aiohttp.ClientSession() as session:
        url = f"https://127.0.0.1:{port}/healthz"
        async with session.get(url, ssl=tls.trust().context(), server_hostname=NAME) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://127.0.0.1:{port}/healthz")
        async with session.get(f"http://127.0.0.1:{metrics_port}/healthz") as response:
            assert response.status == 200
    await asyncio.sleep(0.05)  # TLS connections close a moment after their session


async def test_a_client_that_leaves_a_stream_over_tls_ends_its_generation(byte_tokenizer: Path, tmp_path: Path) -> None:
    tls = Tls(tmp_path)
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.02)
    context = tls.server().context
    async with serving(byte_tokenizer, engine=engine, tls=context) as served, aiohttp.ClientSession() as session:
        response = await session.post(
            f"{served.url}/v1/chat/completions",
            json={**CHAT, "stream": True},
            ssl=tls.trust().context(),
            server_hostname=NAME,
        )
        async for line in response.content:
            if b'"content":"x' in line:
                break
        response.close()
        await until(lambda: served.runtime.snapshot().in_flight == 0, timeout_s=5.0)
        assert engine.tokens_made < 400
    await asyncio.sleep(0.05)
