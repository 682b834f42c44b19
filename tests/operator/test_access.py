"""How the operator reaches the API server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from lorapool_operator.access import load_configuration, login_handler, make_client
from lorapool_operator.effects.cluster import Cluster


def kubeconfig(folder: Path, server: TestServer) -> Path:
    path = folder / "kubeconfig"
    config = {
        "clusters": [{"name": "c", "cluster": {"server": str(server.make_url("")).rstrip("/")}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return path


def server_of(seen: list[str | None]) -> TestServer:
    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"metadata": {"name": "a"}})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    return TestServer(app)


async def test_a_proxy_for_sources_is_not_used_for_the_api_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    seen: list[str | None] = []
    async with server_of(seen) as server:
        client = make_client(await load_configuration(kubeconfig(tmp_path, server)))
        found = await Cluster(client, timeout_s=5.0, identity="test").get("Pod", "team", "a")
        await client.close()
    assert found["metadata"]["name"] == "a"
    assert seen == ["Bearer secret"]


async def test_kopf_logs_in_with_the_same_token(tmp_path: Path) -> None:
    seen: list[str | None] = []
    async with server_of(seen) as server:
        access = await login_handler(kubeconfig(tmp_path, server))()
        async with access.aiohttp_session as session, session.get(f"{access.server}/apis"):
            pass
    assert seen == ["Bearer secret"]
