"""A whole gateway process with a ledger: its journal, its metrics, and what it forwards."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from gateway_world import KEY, FakeKube, World, until, world
from ledger_stub import TOKEN, StubLedger
from yarl import URL

from lorapool_api.settings import SettingsError
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_gateway.ledger.forward import Forwarder
from lorapool_gateway.ledger.sender import LedgerClient
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.process import GatewayProcess, running
from lorapool_gateway.routing.kube import Kube
from lorapool_gateway.routing.watch import KubeSource
from lorapool_gateway.settings import Settings, read_settings

AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


@asynccontextmanager
async def process_of(api: FakeKube, folder: Path, ledger: StubLedger) -> AsyncIterator[GatewayProcess]:
    (folder / "token").write_text(TOKEN)
    settings = Settings(
        keys_namespace="lorapool", listen_host="127.0.0.1", api_port=0, metrics_port=0,
        ledger_url=f"http://127.0.0.1:{ledger.port}", ledger_token_file=folder / "token",
        journal_dir=folder / "journal",
    )  # fmt: skip
    kube = await Kube.connect(api.kubeconfig(folder))
    try:
        metrics = Metrics()
        source = KubeSource(kube, None, "lorapool", metrics.watch_failed)
        async with running(settings, RuntimeTokens(["m" * 64]), source, kube, metrics) as process:
            await until(lambda: process.tables.synced)
            yield process
    finally:
        await kube.close()


def secret() -> dict[str, Any]:
    data = {"keySha256": hashlib.sha256(KEY.encode()).hexdigest(), "namespaces": "*"}
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}
    metadata = {"name": "key", "namespace": "lorapool", "uid": "uid-key", "labels": {"lorapool.dev/api-key": "true"}}
    return {"metadata": metadata, "data": encoded}


async def test_a_process_writes_a_journal_shows_its_state_and_sends_all_of_it_when_it_stops(tmp_path: Path) -> None:
    async with FakeKube().running() as api, StubLedger(status=503).running() as ledger, aiohttp.ClientSession() as http:
        api.put("secrets", secret())
        async with process_of(api, tmp_path, ledger) as process:
            url = f"http://127.0.0.1:{process.api_port}/v1/chat/completions"
            for _ in range(3):
                async with http.post(url, json={"model": "unknown"}, headers=AUTHORIZED) as response:
                    assert response.status == 404
            async with http.get(f"http://127.0.0.1:{process.metrics_port}/metrics") as response:
                text = await response.text()
            assert 'lorapool_gateway_journal_lost_records_total{reason="full"} 0.0' in text
            assert "lorapool_gateway_journal_unsent_records 0.0" in text
            ledger.status = 200
        [batch] = ledger.committed.values()
    assert [(row.key_uid, row.code, row.count) for row in batch] == [("uid-key", "model_not_found", 3)]
    assert os.listdir(tmp_path / "journal") == []


def test_a_journal_without_a_ledger_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match="ledger_url"):
        read_settings({"LORAPOOL_GATEWAY_KEYS_NAMESPACE": "x", "LORAPOOL_GATEWAY_JOURNAL_DIR": "/tmp/x"})


# --- forwarding ----------------------------------------------------------------------------


@asynccontextmanager
async def forwarding(here: World, *, away: bool = False) -> AsyncIterator[list[web.BaseRequest]]:
    """The gateway forwards to a ledger that answers with CSV of two parts."""
    seen: list[web.BaseRequest] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request)
        out = web.StreamResponse(headers={"Content-Type": "text/csv", "x-lorapool-secret": "1"})
        await out.prepare(request)
        await out.write(b"a,b\n")
        if request.query.get("lost"):
            assert request.transport is not None
            request.transport.abort()
        await out.write(b"1,2\n")
        return out

    runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    if away:
        await runner.cleanup()
    client = LedgerClient(f"http://127.0.0.1:{port}", lambda: ("x",), lambda: None)
    here.gateway._forwarder = Forwarder(client)
    try:
        yield seen
    finally:
        await client.close()
        await runner.cleanup()


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        yield made


PATH = "/v1/organization/usage/completions?start_time=1&group_by%5B%5D=model&page=a%2Bb"


async def test_usage_is_forwarded_with_the_clients_key_and_nothing_else_of_its_headers(here: World) -> None:
    forged = {"x-lorapool-key": "forged", "x-lorapool-project": "forged", "Cookie": "a=b", **AUTHORIZED}
    async with forwarding(here) as seen, here.session.get(URL(here.url + PATH, encoded=True), headers=forged) as answer:
        assert (answer.status, answer.headers["Content-Type"], await answer.text()) == (200, "text/csv", "a,b\n1,2\n")
    [request] = seen
    assert request.rel_url.raw_path_qs == PATH
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert not {"x-lorapool-key", "x-lorapool-project", "cookie"} & {name.lower() for name in request.headers}
    assert "x-lorapool-secret" not in answer.headers
    assert answer.headers["x-request-id"]


async def test_only_get_of_plain_paths_by_known_keys_is_forwarded(here: World) -> None:
    async with forwarding(here) as seen:
        answers = [
            await here.post({}, path="/v1/organization/costs"),
            await here.session.get(here.url + "/v1/organization/costs"),
            await here.session.get(
                URL(here.url + "/v1/organization/%2e%2e/attempts", encoded=True), headers=AUTHORIZED
            ),
            await here.session.get(here.url + "/v1/organization/", headers=AUTHORIZED),
        ]
        assert [answer.status for answer in answers] == [405, 401, 404, 404]
        for answer in answers:
            answer.release()
    assert seen == []


@pytest.mark.parametrize("away", [True, None])
async def test_a_ledger_that_is_away_or_was_never_installed_is_named(here: World, away: bool | None) -> None:
    async with forwarding(here, away=bool(away)):
        if away is None:
            here.gateway._forwarder = Forwarder(None)
        async with here.session.get(here.url + "/v1/organization/costs", headers=AUTHORIZED) as answer:
            error = (await answer.json())["error"]
    assert answer.status == 503
    assert ("cannot be reached" if away else "ledger.enabled") in error["message"]


async def test_a_ledger_that_is_lost_in_the_middle_does_not_look_complete(here: World) -> None:
    async with forwarding(here):
        with pytest.raises(aiohttp.ClientError):
            async with here.session.get(here.url + "/v1/organization/costs?lost=1", headers=AUTHORIZED) as answer:
                await answer.read()
    await asyncio.sleep(0)
