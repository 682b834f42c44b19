"""What a tenant learns of another's files, jobs and models: nothing. And what is deleted is gone from the storage.

Everything runs against the store's own process, in front of a folder, and deletions in front of an S3 bucket as well.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
from base_world import meta
from bucket_kit import running_bucket
from gateway_world import KEY, OTHER_KEY
from store_kit import MASTER, StoreProcess
from tuning_world import A, B, TuningWorld, tuning_world

from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_api.tuning.finetunejob import ANNOTATION_JOB
from lorapool_operator.effects.job_files import StoreFiles
from lorapool_operator.effects.store_grants import StoreGrants

DATA = b'{"messages": []}\n' * 100
NOW = "2026-11-30T12:00:00Z"
UNKNOWN = {
    "{file}": "file-" + "x" * 24,
    "{result}": "file-result-" + "a" * 24,
    "{job}": "ftjob-" + "a" * 24,
    "{alias}": "ft:tiny:team-a:x:11111111",
    "{model}": f"{A}/nothing",
}
JOBS = "/v1/fine_tuning/jobs"
CALLS: list[tuple[str, str, dict[str, str] | None]] = [
    *((method, f"/v1/files/{{{kind}}}", None) for kind in ("file", "result") for method in ("GET", "DELETE")),
    *(("GET", f"/v1/files/{{{kind}}}/content", None) for kind in ("file", "result")),
    ("GET", "/v1/files?after={file}", None),
    ("GET", f"{JOBS}/{{job}}", None),
    *(("POST", f"{JOBS}/{{job}}/{what}", None) for what in ("cancel", "pause", "resume")),
    *(("GET", f"{JOBS}/{{job}}/{what}", None) for what in ("events", "checkpoints")),
    ("GET", f"{JOBS}?after={{job}}", None),
    *((method, f"/v1/models/{{{kind}}}", None) for kind in ("alias", "model") for method in ("GET", "DELETE")),
    *(
        ("POST", JOBS, {"model": "tiny", "training_file": "{own}", param: f"{{{kind}}}"})
        for param, kind in (
            ("training_file", "file"),
            ("validation_file", "file"),
            ("model", "alias"),
            ("model", "model"),
        )
    ),
]


@dataclass
class Backend:
    """A store's process, and the names of what is in its storage."""

    store: StoreProcess
    names: Any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    store = StoreProcess(tmp_path_factory.mktemp("store")).start()
    yield Backend(store, store.files)
    store.stop()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with running_bucket() as made:
        store = StoreProcess(tmp_path_factory.mktemp("store"), made.settings()).start()
        yield Backend(store, made.names)
        store.stop()


@dataclass
class Owned:
    """What team-a has, by the placeholder in a call."""

    here: TuningWorld
    ids: dict[str, str]
    job_uid: str

    async def call(self, key: str, method: str, path: str, body: dict[str, str] | None) -> httpx2.Response:
        """A call that names team-a's things."""
        return await self._sent(self.ids, key, method, path, body)

    async def call_unknown(self, key: str, method: str, path: str, body: dict[str, str] | None) -> httpx2.Response:
        """The same call about things that do not exist."""
        return await self._sent({**self.ids, **UNKNOWN}, key, method, path, body)

    async def _sent(
        self, names: dict[str, str], key: str, method: str, path: str, body: dict[str, str] | None
    ) -> httpx2.Response:
        text = json.dumps(body) if body is not None else None
        for placeholder, name in names.items():
            path = path.replace(placeholder, name)
            text = text.replace(placeholder, name) if text is not None else None
        return await self.here.call(method, path, key, content=text)

    def anonymous(self, text: str) -> str:
        """A body without the ids that it repeats."""
        for placeholder, name in [*self.ids.items(), *UNKNOWN.items()]:
            text = text.replace(name, placeholder)
        return text


@asynccontextmanager
async def owned(backend: Backend) -> AsyncIterator[Owned]:
    """A file, an ended job with its metrics and events, and a model of team-a, and a file of team-b."""
    store = backend.store
    for namespace in (A, B):
        store.call("DELETE", f"{namespace}/")
    async with tuning_world(store) as here, here.client() as client:
        file = await here.upload(DATA)
        job = await client.fine_tuning.jobs.create(model="tiny", training_file=file)
        uid = here.objects.jobs[f"{A}/{job.id}"]["metadata"]["uid"]
        here.objects.status(A, job.id, state="Succeeded", finishedAt=NOW)
        store.call("PUT", f"{A}/jobs/{uid}/result_files/step_metrics.csv", b"step,train_loss\n1,2.5\n")
        store.call("PUT", f"{A}/jobs/{uid}/events/0000000000.jsonl", b'{"id": "ftevent-1", "message": "secret"}\n')
        store.call("PUT", f"{A}/adapters/{uid}/adapter_config.json", b"{}")
        alias = "ft:tiny:team-a:x:00000000"
        source = {"uri": f"store://{A}/adapters/{uid}"}
        here.world.adapter("mine", A, base="tiny", base_namespace="models", source=source, alias=alias)
        here.world.adapters[f"{A}/mine"]["metadata"]["annotations"] = {ANNOTATION_JOB: "x"}
        here.world.publish()
        [result] = (await client.fine_tuning.jobs.retrieve(job.id)).result_files
        ids = {"{file}": file, "{result}": result, "{job}": job.id, "{alias}": alias, "{model}": f"{A}/mine"}
        yield Owned(here, {**ids, "{own}": await here.upload(DATA, OTHER_KEY)}, uid)


@pytest.mark.parametrize(
    ("method", "path", "body"), CALLS, ids=lambda value: json.dumps(value) if isinstance(value, dict) else value
)
async def test_another_tenants_things_are_answered_as_things_that_do_not_exist(
    folder: Backend, method: str, path: str, body: dict[str, str] | None
) -> None:
    async with owned(folder) as mine:
        before = folder.names(), json.dumps(mine.here.objects.jobs)
        foreign = await mine.call(OTHER_KEY, method, path, body)
        unknown = await mine.call_unknown(OTHER_KEY, method, path, body)
        assert foreign.status_code == unknown.status_code
        assert foreign.status_code in (400, 404)
        assert mine.anonymous(foreign.text) == mine.anonymous(unknown.text)
        assert sorted(foreign.headers) == sorted(unknown.headers)
        assert (folder.names(), json.dumps(mine.here.objects.jobs)) == before
        assert mine.here.objects.deleted == []


@pytest.mark.parametrize("path", ["/v1/files", JOBS, "/v1/models"])
async def test_lists_have_nothing_of_another_tenant(folder: Backend, path: str) -> None:
    async with owned(folder) as mine:
        shown = await mine.here.call("GET", path, OTHER_KEY)
        assert shown.status_code == 200
        assert not [name for name in mine.ids.values() if name in shown.text and name != mine.ids["{own}"]]
        assert mine.job_uid not in shown.text


@pytest.mark.parametrize("storage", ["folder", "bucket"])
async def test_what_a_tenant_deletes_is_gone_from_the_storage(storage: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(storage)
    async with owned(backend) as mine, mine.here.client(KEY) as client:
        uid, names = mine.job_uid, backend.names

        def kept(part: str) -> list[str]:
            return [name for name in names() if part in name]

        assert kept(mine.ids["{file}"])
        assert (await client.files.delete(mine.ids["{file}"])).deleted
        assert kept(mine.ids["{file}"]) == backend.store.keys(A, "files/") == backend.store.keys(A, "file-info/") == []

        assert kept("step_metrics.csv")
        assert (await client.files.delete(mine.ids["{result}"])).deleted
        assert kept("step_metrics.csv") == backend.store.keys(A, f"jobs/{uid}/result_files/") == []

        assert kept(f"adapters/{uid}")
        assert (await client.models.delete(mine.ids["{alias}"])).deleted
        assert kept(f"adapters/{uid}") == backend.store.keys(A, "adapters/") == []
        assert len(mine.here.objects.deleted) == 1

        assert kept(uid)
        grants = StoreGrants(backend.store.url, MasterTokens((MASTER,)))
        await StoreFiles(grants).delete(meta("job", uid, namespace=A), keep_result=False)  # as a deleted object is
        assert kept(uid) == backend.store.keys(A) == []
        for name in ("{file}", "{result}"):
            with pytest.raises(openai.NotFoundError):
                await client.files.content(mine.ids[name])
