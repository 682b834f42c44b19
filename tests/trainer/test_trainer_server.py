"""The operator's protocol over HTTP: jobs whose files are in a store, reports, proofs, and what outlives a trainer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from tuning_kit import environment, save_tiny_base, write_data

from lorapool_api.protocol import StartupPhase, StartupReport, token_sha256
from lorapool_api.settings import variables
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge
from lorapool_api.tuning.trainer_protocol import JobReport, TrainerSnapshot
from lorapool_operator.decisions.tuning.session import SHARED
from lorapool_trainer.data.encoder import Encoder
from lorapool_trainer.engine import Engine
from lorapool_trainer.serve.server import TrainerState, make_app
from lorapool_trainer.serve.settings import TrainerSettings
from lorapool_trainer.serve.worker import Worker
from lorapool_trainer.session import BaseName, Session
from lorapool_trainer.suspects import Suspects

TOKEN = "the-token-of-this-base"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
JOB = "/v1/jobs/uid-1"


class Listed(NamedTuple):
    key: str


class MemoryStore:
    """A store that keeps objects in a dictionary, by `namespace/key`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def list(self, namespace: str, prefix: str = "") -> list[Listed]:
        start = f"{namespace}/"
        return [Listed(name.removeprefix(start)) for name in sorted(self.objects) if name.startswith(start + prefix)]

    def get(self, namespace: str, key: str) -> bytes:
        return self.objects[f"{namespace}/{key}"]

    def stream(self, namespace: str, key: str) -> Iterator[bytes]:
        yield self.objects[f"{namespace}/{key}"]

    def put(self, namespace: str, key: str, data: bytes) -> None:
        self.objects[f"{namespace}/{key}"] = data

    def delete(self, namespace: str, key: str) -> None:
        own = f"{namespace}/{key}"
        for name in [name for name in self.objects if name == own or (own.endswith("/") and name.startswith(own))]:
            del self.objects[name]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    return Engine.load(str(base), dtype="float32", token_budget=256)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    made = MemoryStore()
    made.objects["team/files/file-1"] = write_data(tmp_path / "data.jsonl").read_bytes()
    return made


@asynccontextmanager
async def serving(
    base: Path, engine: Engine, store: MemoryStore, folder: Path
) -> AsyncIterator[tuple[ClientSession, TrainerState]]:
    """A trainer of its own folder, whose pod has the uid pod-1."""
    settings = TrainerSettings(model=str(base), token_sha256=token_sha256(TOKEN), pod_uid="pod-1")
    state = TrainerState(settings, lambda: StartupReport(phase=StartupPhase.LOADING))
    loop = asyncio.get_running_loop()
    encoder = Encoder.of_base(base, rows=260)

    def changed(at_once: bool) -> None:
        loop.call_soon_threadsafe(state.changes.bump)

    session = Session(engine, encoder, BaseName("team/tiny", "base-1"), Suspects(folder))
    state.worker = Worker(session, folder / "jobs", lambda _job: store, changed)
    state.worker.start()
    async with TestServer(make_app(state)) as server, ClientSession(server.make_url("/"), headers=BEARER) as client:
        yield client, state
    state.worker.stop()
    await asyncio.wrap_future(state.worker.ended)
    for uid in list(session.jobs):
        session.delete(uid)
    encoder.close()
    await asyncio.sleep(0)


def order(**changes: Any) -> dict[str, Any]:
    return {
        "display": "team/one",
        "createdUnixS": 1.0,
        "workspace": "store://team/jobs/uid-1",
        "output": "store://team/adapters/uid-1",
        "data": {"training": {"uri": "store://team/files/file-1"}, "validationFraction": "0.2"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"epochs": 4, "batchSize": 4, "learningRate": "1e-2", "maxTokens": 128},
        **changes,
    }


async def put(client: ClientSession, **changes: Any) -> JobReport:
    async with client.put(JOB, json=order(**changes)) as response:
        body = await response.json()
        assert response.status == 200, body
        return JobReport.model_validate(body["job"])


async def snapshot(client: ClientSession, after: int = 0, boot: str = "", wait: float = 0) -> TrainerSnapshot:
    async with client.get("/v1/trainer", params={"after": after, "boot": boot, "wait": wait}) as response:
        return TrainerSnapshot.model_validate_json(await response.read())


async def until(client: ClientSession, holds: Callable[[JobReport], object]) -> JobReport:
    """Long-polls until the job's report is so."""
    found = await snapshot(client)
    async with asyncio.timeout(240):
        while not ((job := found.job("uid-1")) and holds(job)):
            found = await snapshot(client, found.seq, found.boot_id, 10)
    return job


async def test_a_job_is_trained_and_everything_that_it_made_is_in_the_store(
    base: Path, engine: Engine, store: MemoryStore, tmp_path: Path
) -> None:
    async with serving(base, engine, store, tmp_path / "first") as (client, state):
        await put(client)
        job = await until(client, lambda job: job.state.ended)
        assert job.state == "Succeeded", job.failure
        assert job.result is not None
        assert job.result.uri == "store://team/adapters/uid-1"
        assert job.metrics is not None
        assert (job.metrics.valid_loss or 9) < (job.metrics.base_valid_loss or 0)
        async with client.get("/metrics") as response:
            assert 'state="Succeeded"} 1.0' in await response.text()
        async with client.delete(JOB) as response:
            assert response.status == 204
        assert (await snapshot(client)).jobs == []
    kept = {name.removeprefix("team/") for name in store.objects}
    assert {"adapters/uid-1/adapter_config.json", "adapters/uid-1/adapter_model.safetensors"} <= kept
    assert {"jobs/uid-1/result_files/step_metrics.csv", "jobs/uid-1/result_files/loss.svg"} <= kept
    events = [
        json.loads(line)
        for name in sorted(kept)
        if "/events/" in name
        for line in store.objects[f"team/{name}"].splitlines()
    ]
    figures = [event["data"] for event in events if event["type"] == "metrics"]
    assert [data["step"] for data in figures] == list(range(17))
    losses = [data["full_valid_loss"] for data in figures if "full_valid_loss" in data]
    assert (losses[0], losses[-1]) == (job.metrics.base_valid_loss, job.metrics.valid_loss)
    assert events[-1]["message"] == "The job was completed; the adapter is stored"
    assert len({event["id"] for event in events}) == len(events)

    async with serving(base, engine, store, tmp_path / "second") as (client, state):
        again = await put(client)
        assert (again.state, again.result) == ("Succeeded", job.result)
        assert state.published.busy_s == 0


async def test_a_trainer_that_ends_leaves_a_checkpoint_from_which_another_one_continues(
    base: Path, engine: Engine, store: MemoryStore, tmp_path: Path
) -> None:
    async with serving(base, engine, store, tmp_path / "whole") as (client, _):
        whole = await until(client, lambda job: job.state.ended) if await put(client) else None
    weights = store.objects.pop("team/adapters/uid-1/adapter_model.safetensors")
    store.delete("team", "jobs/uid-1/")
    async with serving(base, engine, store, tmp_path / "first") as (client, _):
        await put(client)
        await until(client, lambda job: job.progress and job.progress.step >= 3)
    async with serving(base, engine, store, tmp_path / "second") as (client, _):
        await put(client)
        job = await until(client, lambda job: job.state.ended)
    assert job.usage.restarts == 1
    assert whole is not None
    assert job.progress is not None
    assert job.progress.trained_tokens == whole.progress.trained_tokens if whole.progress else False
    assert store.objects["team/adapters/uid-1/adapter_model.safetensors"] == weights
    assert [data["step"] for data in figures_of(store)] == list(range(17))


def figures_of(store: MemoryStore) -> list[dict[str, Any]]:
    """The figures of all events of the job, in their order."""
    parts = [store.objects[name] for name in sorted(store.objects) if name.startswith("team/jobs/uid-1/events/")]
    events = [json.loads(line) for part in parts for line in part.splitlines()]
    return [event["data"] for event in events if event["type"] == "metrics"]


async def test_only_who_has_the_token_or_a_proof_is_answered(
    base: Path, engine: Engine, store: MemoryStore, tmp_path: Path
) -> None:
    async with serving(base, engine, store, tmp_path / "first") as (client, _):
        wrong = {"Authorization": "Bearer wrong"}
        for method, path in (("GET", "/v1/trainer"), ("PUT", JOB), ("DELETE", JOB), ("GET", "/metrics")):
            async with client.request(method, path, headers=wrong) as response:
                assert response.status == 401
        challenge = Challenge.new(token_sha256(TOKEN), "pod-1")
        async with client.get("/v1/trainer", headers={"Authorization": challenge.authorization}) as response:
            challenge.check(token_sha256(TOKEN), response.headers[HEADER_PROOF], await response.read())
        other = Challenge.new(token_sha256(TOKEN), "pod-2")
        async with client.get("/v1/trainer", headers={"Authorization": other.authorization}) as response:
            assert response.status == 401
        async with client.put(JOB, json=order(lora={"rank": 64})) as response:
            assert (response.status, "more than 16" in await response.text()) == (400, True)
        async with client.put(JOB, json={"display": 7}) as response:
            assert response.status == 400


def test_the_process_loads_its_base_and_ends_with_0_when_there_is_no_work(base: Path, tmp_path: Path) -> None:
    own = {"MODEL": str(base), "LISTEN_PORT": "0", "IDLE_AFTER_S": "0.5", "CACHE_DIR": str(tmp_path), "THREADS": "1"}
    variables = {**environment(), **{f"LORAPOOL_TRAINER_{name}": value for name, value in own.items()}}
    done = subprocess.run(
        [sys.executable, "-m", "lorapool_trainer", "serve"], env=variables, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, '"message": "ready"' in done.stderr) == (0, True), done.stderr


def test_every_setting_that_the_operator_passes_on_exists() -> None:
    """An unknown variable would end the process."""
    known = {name for names in variables(TrainerSettings, TrainerSettings.prefix).values() for name in names}
    assert {f"LORAPOOL_TRAINER_{name}" for name in SHARED} <= known


async def test_an_adapter_is_continued_from_the_store_and_refused_with_another_digest_or_without_files(
    base: Path, engine: Engine, store: MemoryStore, tmp_path: Path
) -> None:
    async with serving(base, engine, store, tmp_path / "first") as (client, _):
        await put(client)
        first = (await until(client, lambda job: job.state.ended)).result
    assert first is not None
    store.delete("team", "jobs/uid-1/")
    source = "team/adapters/first"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        store.objects[f"{source}/{name}"] = store.objects[f"team/adapters/uid-1/{name}"]
    store.objects[f"{source}/chat_template.jinja"] = b"no part of what the digest covers"
    wanted = {"source": {"uri": f"store://{source}"}, "digest": first.digest}
    async with serving(base, engine, store, tmp_path / "second") as (client, _):
        await put(client, initFrom=wanted, lora={})
        job = await until(client, lambda job: job.state.ended)
        assert job.state == "Succeeded", job.failure
        assert job.resolved is not None
        assert (job.resolved.rank, job.resolved.alpha) == (4, 8)
    assert "team/adapters/uid-1/chat_template.jinja" not in store.objects
    store.delete("team", "jobs/uid-1/")
    store.objects[f"{source}/adapter_config.json"] += b" "
    async with serving(base, engine, store, tmp_path / "third") as (client, _):
        await put(client, initFrom=wanted, lora={})
        failure = (await until(client, lambda job: job.state.ended)).failure
    assert failure is not None
    assert failure.reason == "Incompatible"
    assert first.digest in failure.message
    assert "create another job to continue the present files" in failure.message
    store.delete("team", "jobs/uid-1/")
    store.delete("team", f"{source.removeprefix('team/')}/")
    async with serving(base, engine, store, tmp_path / "fourth") as (client, _):
        await put(client, initFrom=wanted, lora={})
        failure = (await until(client, lambda job: job.state.ended)).failure
    assert failure is not None
    assert (failure.reason, "were deleted" in failure.message) == ("Incompatible", True)
