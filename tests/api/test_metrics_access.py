"""TLS and the token of the metrics listeners, on real sockets."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from artifact_hub import self_signed
from prometheus_client import CollectorRegistry

from lorapool_api.liveness import Heartbeat
from lorapool_api.settings import ProcessSettings, SettingsError
from lorapool_api.trust.health_port import health_app
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_gateway.metrics import Metrics
from lorapool_operator.metrics import status_app
from lorapool_runtime.serving.probes import make_probes_app
from lorapool_runtime.serving.service import Runtime
from lorapool_runtime.settings import RuntimeSettings


def certificate(folder: Path) -> None:
    pem = self_signed(folder)
    for name in ("tls.crt", "tls.key"):
        (folder / name).write_bytes(pem.read_bytes())


def access(**files: Path) -> MetricsAccess:
    return MetricsAccess(ProcessSettings(**files))


@asynccontextmanager
async def listening(app: web.Application, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def status(url: str, *, token: str | None = None, ca: Path | None = None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    tls = ssl.create_default_context(cafile=str(ca)) if ca else True
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url, ssl=tls) as response:
        await response.read()
        return response.status


def apps(rules: MetricsAccess) -> dict[str, web.Application]:
    return {
        "gateway": health_app(Metrics().text, rules, lambda: True, lambda: True),
        "operator": status_app(CollectorRegistry(), rules, healthy=lambda: "", ready=lambda: ""),
        "runtime": make_probes_app(
            Runtime(RuntimeSettings(model="any")), rules, Heartbeat(30.0), asyncio.get_running_loop()
        ),
    }


@pytest.mark.parametrize("process", ["gateway", "operator", "runtime"])
async def test_metrics_need_the_token_and_probes_need_none(tmp_path: Path, process: str) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    async with listening(apps(access(metrics_token_file=file))[process]) as url:
        assert [await status(f"{url}/metrics", token=token) for token in (None, "wrong", "secret")] == [401, 401, 200]
        assert await status(f"{url}/healthz") == 200
        file.write_text("another")
        assert [await status(f"{url}/metrics", token=token) for token in ("secret", "another")] == [401, 200]
        file.unlink()
        assert await status(f"{url}/metrics", token="another") == 401


async def test_without_settings_metrics_are_open() -> None:
    async with listening(apps(access())["gateway"]) as url:
        assert await status(f"{url}/metrics") == 200


async def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    certificate(tmp_path)
    rules = access(metrics_tls_dir=tmp_path)
    async with listening(apps(rules)["gateway"], rules.tls) as url:
        assert await status(f"{url}/metrics", ca=tmp_path / "tls.crt") == 200
        certificate(tmp_path)
        os.utime(tmp_path / "tls.crt", (1, 1))  # another time, however coarse the file system's clock
        assert await status(f"{url}/metrics", ca=tmp_path / "tls.crt") == 200


def test_files_that_cannot_be_used_are_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="certificate in"):
        access(metrics_tls_dir=tmp_path)
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(SettingsError, match="is empty"):
        access(metrics_token_file=tmp_path / "token")
