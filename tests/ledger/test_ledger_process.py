"""The ledger as a process: it collects from pods that prove themselves, and survives kills and a lost database."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ledger_kit as kit
import pytest
from aiohttp import web
from fakes import FakeRuntime
from gateway_world import FakeKube, base_object
from ledger_kit import batch, closed, request, rows, until
from ledger_process import RUNTIME_MASTER, TOKEN, LedgerProcess
from openai import AsyncOpenAI
from pods import owner_objects, pod_object
from postgres_kit import running_postgres

from lorapool_api.protocol import runtime_token
from lorapool_api.usage_protocol import ROUTE_ATTEMPTS, ROUTE_USAGE, GatewayBatch
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database

BASE_UID = "base-demo-tiny"
opened = functools.partial(kit.opened, pod_uid="uid-pod-1", base="demo/tiny")
"""Sent to the pod of these tests."""


@dataclass
class RuntimeWithUsage(FakeRuntime):
    """The fake runtime, which proves itself, with records for the ledger."""

    usage: kit.FakeRuntime = field(default_factory=lambda: kit.FakeRuntime(now_s=time.time))

    def _app(self) -> web.Application:
        app = super()._app()
        self.usage.token = self.token
        app.router.add_get(ROUTE_USAGE, self.usage.get)
        app.router.add_delete(ROUTE_USAGE, self.usage.delete)
        return app


@dataclass
class Cluster:
    kube: FakeKube
    runtime: RuntimeWithUsage
    ledger: LedgerProcess


@contextlib.asynccontextmanager
async def cluster(folder: Path, database_url: str) -> AsyncIterator[Cluster]:
    """A base with one pod, and a ledger that is not started."""
    token = runtime_token(RUNTIME_MASTER, BASE_UID)
    runtime = RuntimeWithUsage(token=token, pod_uid="uid-pod-1")
    runtime.usage.boots = {"boot-1": [kit.boot(), request(2, 1), kit.checkpoint(3, [request(2, 1)])]}
    kube = FakeKube()
    async with runtime.running(), kube.running():
        kube.put("basemodels", base_object(runtimeProfile="tiny"))
        deployment, replica_set = owner_objects()
        for plural, raw in (("deployments", deployment), ("replicasets", replica_set)):
            kube.put(plural, raw)
        kube.put("pods", pod_object(runtime.port))
        ledger = LedgerProcess(folder, database_url, kube.kubeconfig(folder))
        try:
            yield Cluster(kube, runtime, ledger)
        finally:
            if ledger.process is not None:
                ledger.stop(signal.SIGKILL)


async def post(ledger: LedgerProcess, sent: GatewayBatch, token: str = TOKEN) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession() as session:
        body = sent.model_copy(update={"now_unix_ms": int(time.time() * 1000)}).model_dump_json(by_alias=True)
        async with session.post(ledger.url + ROUTE_ATTEMPTS, data=body, headers=headers) as response:
            return response.status


async def summed(database_url: str, requests: int) -> list[dict[str, Any]]:
    """Waits until the sums have so many requests, and returns them."""
    database = Database.open(database_url)

    async def true() -> bool:
        return sum(row["requests"] for row in await rows(database, tables.usage_hour)) == requests

    try:
        await until(true, 60)
        return await rows(database, tables.usage_hour)
    finally:
        await database.close()


async def test_it_collects_sums_and_goes_on_after_a_kill(tmp_path: Path, database_url: str) -> None:
    async with cluster(tmp_path, database_url) as here:
        ledger = here.ledger.start()
        assert await post(ledger, batch([opened(1, 1), closed(2, 1)])) == 200
        assert await post(ledger, batch([opened(1, 1)]), "wrong") == 401
        (sums,) = await summed(database_url, 1)
        assert (sums["outcome"], sums["delivered_tokens"], sums["base"]) == ("completed", 5, "demo/tiny")
        assert ledger.status("/readyz") == ledger.status("/healthz") == 200
        assert ledger.metric("lorapool_ledger_leading") == 1
        assert ledger.stop(signal.SIGKILL) == -signal.SIGKILL
        here.runtime.usage.boots["boot-1"].append(request(4, 2))
        ledger.start()
        assert await post(ledger, batch([opened(1, 1), closed(2, 1), opened(3, 2), closed(4, 2)])) == 200
        (sums,) = await summed(database_url, 2)
        assert sums["completion_tokens"] == 10
        assert ledger.stop() == 0
        assert "Traceback" not in ledger.log


async def test_a_pod_whose_owners_are_not_the_bases_is_not_sent_the_token(tmp_path: Path) -> None:
    url = kit.sqlite_url(tmp_path)
    async with cluster(tmp_path, url) as here:
        here.kube.put("pods", pod_object(here.runtime.port, owner="another-set"))
        here.ledger.start()
        assert await post(here.ledger, batch([opened(1, 1), closed(2, 1)])) == 200
        await summed(url, 1)
        assert here.runtime.usage.asked == []
        assert here.runtime.authorizations == []


async def test_without_its_database_it_refuses_and_loses_nothing(tmp_path: Path) -> None:
    with running_postgres() as server:
        url = server.database()
        async with cluster(tmp_path, url) as here:
            server.stop()
            ledger = here.ledger.start(wait=False)

            async def waits() -> bool:
                return "waiting for the database" in ledger.log

            await until(waits, 60)
            server.start()
            ledger.stop(signal.SIGKILL)
            ledger.start()
            assert await post(ledger, batch([opened(1, 1), closed(2, 1)])) == 200
            await summed(url, 1)
            server.stop()
            assert await post(ledger, batch([opened(3, 2), closed(4, 2)])) == 503

            async def not_ready() -> bool:
                return ledger.status("/readyz") == 503

            await until(not_ready, 60)
            assert ledger.status("/healthz") == 200
            here.runtime.usage.boots["boot-1"].append(request(4, 2))
            server.start()

            async def ready() -> bool:
                return ledger.status("/readyz") == 200

            await until(ready, 60)
            assert await post(ledger, batch([opened(3, 2), closed(4, 2)])) == 200
            (sums,) = await summed(url, 2)
            assert sums["delivered_tokens"] == 10


async def test_of_two_replicas_one_leads_and_the_other_takes_over(tmp_path: Path) -> None:
    with running_postgres() as server:
        url = server.database()
        async with cluster(tmp_path, url) as here:
            first = here.ledger.start()
            (tmp_path / "second").mkdir()
            second = LedgerProcess(tmp_path / "second", url, here.ledger.kubeconfig).start()
            try:

                async def leads() -> bool:
                    return first.metric("lorapool_ledger_leading") == 1

                await until(leads, 60)
                assert second.metric("lorapool_ledger_leading") == 0
                assert await post(second, batch([opened(1, 1), closed(2, 1)])) == 200
                await summed(url, 1)
                first.stop(signal.SIGKILL)
                here.runtime.usage.boots["boot-1"].append(request(4, 2))
                await summed(url, 2)
                assert second.metric("lorapool_ledger_leading") == 1
            finally:
                second.stop(signal.SIGKILL)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"LORAPOOL_LEDGER_DATABASE_URL": "mysql://x"}, "the database URL is not usable"),
        ({"LORAPOOL_LEDGER_TOKEN_FILE": "/missing/token"}, "/missing/token"),
        ({"LORAPOOL_LEDGER_TYPO": "1"}, "unknown setting LORAPOOL_LEDGER_TYPO"),
    ],
)
async def test_settings_that_cannot_work_end_it_with_the_remedy(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    async with FakeKube().running() as kube:
        ledger = LedgerProcess(tmp_path, kit.sqlite_url(tmp_path), kube.kubeconfig(tmp_path), settings)
        ledger.start(wait=False)
        assert ledger.process is not None
        assert ledger.process.wait(60) == 2
        assert said in ledger.log
        assert "Traceback" not in ledger.log


def test_a_backup_that_is_made_while_it_writes_can_be_opened(tmp_path: Path) -> None:
    database = Database.open(kit.sqlite_url(tmp_path))
    with sqlite3.connect(tmp_path / "ledger.db") as source:
        source.execute("VACUUM INTO ?", (str(tmp_path / "copy.db"),))
    database.engine.dispose()
    code = "import sys; from lorapool_ledger.store.database import Database; Database.open(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tmp_path}/copy.db"], env=dict(os.environ), check=False
    )
    assert done.returncode == 0


async def test_keys_of_the_cluster_read_usage_and_log_in_to_the_console(tmp_path: Path) -> None:
    url = kit.sqlite_url(tmp_path)
    async with cluster(tmp_path, url) as here:
        for name, data in (("owner", {"namespaces": "*", "admin": "true"}), ("acme-key", {"namespaces": "acme"})):
            encoded = {"keySha256": hashlib.sha256(f"lp-{name}".encode()).hexdigest(), **data}
            here.kube.put(
                "secrets",
                {
                    "metadata": {
                        "name": name,
                        "namespace": "lorapool",
                        "uid": f"uid-{name}",
                        "labels": {"lorapool.dev/api-key": "true"},
                    },
                    "data": {field: base64.b64encode(text.encode()).decode() for field, text in encoded.items()},
                },
            )
        ledger = here.ledger.start()
        assert await post(ledger, batch([opened(1, 1), closed(2, 1)])) == 200
        await summed(url, 1)
        async with (
            AsyncOpenAI(admin_api_key="lp-owner", api_key="-", base_url=f"{ledger.url}/v1", max_retries=8) as client,
            aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser,
        ):
            page = await client.admin.organization.usage.completions(
                start_time=kit.T0_S, end_time=kit.T0_S + 86400, group_by=["project_id", "model"]
            )
            (result,) = page.data[0].results
            assert result.to_dict().items() >= {"project_id": "acme", "model": "acme/tone", "output_tokens": 5}.items()
            answer = await browser.post(f"{ledger.url}/console/login", data={"key": "lp-acme-key"})
            assert (answer.status, answer.url.path) == (200, "/console/")
            shown = await (await browser.get(f"{ledger.url}/console/adapter/acme/tone?period=2026-11")).text()
            assert '<data value="1">1</data>' in shown
        assert "lp-" not in ledger.log
