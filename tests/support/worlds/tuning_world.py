"""A gateway on a real socket with files and fine-tuning, in front of a store's process and an API server in memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx2
import openai
from gateway_world import KEY, OTHER_KEY, World, api_key, world
from store_kit import MASTER, StoreProcess

from lorapool_api.trust.tls import ReleaseTrust
from lorapool_gateway.routing.auth import KeyTable
from lorapool_gateway.routing.kube import KubeError
from lorapool_gateway.routing.source import Kind, ObjectCache
from lorapool_gateway.tuning.files import Files
from lorapool_gateway.tuning.job_object import Job, parse_object
from lorapool_gateway.tuning.jobs import Jobs
from lorapool_gateway.tuning.routes import Tuning
from lorapool_gateway.tuning.store_client import StoreClient
from lorapool_gateway.tuning.upload import UploadLimits

A, B = "team-a", "team-b"
CHAT_KEY = "lp-" + "c" * 43
"""A key of team-a that may not fine-tune."""


@dataclass
class FakeObjects:
    """What the gateway asks of the API server about fine-tuning jobs, and a watch of them for each gateway."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By namespace/name."""
    caches: list[ObjectCache[Job]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    """Paths of deleted objects, with their uids."""
    watching: bool = True
    """False: the watches show nothing new."""
    calls: list[str] = field(default_factory=list)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    def cache(self) -> ObjectCache[Job]:
        made = ObjectCache(Kind.JOBS, parse_object, lambda: None)
        made.replace_all(made.parse_all(self.jobs.values()))
        self.caches.append(made)
        return made

    def status(self, namespace: str, name: str, **status: Any) -> None:
        """Writes a status, as the operator does."""
        self.jobs[f"{namespace}/{name}"]["status"] = status
        self._show(self.jobs[f"{namespace}/{name}"])

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        self.calls.append(f"get {path}")
        namespace, name = _parts(path)
        if name:
            return copy.deepcopy(self._find(namespace, name))
        label, _, value = (params or {})["labelSelector"].partition("=")
        mine = [raw for raw in self.jobs.values() if raw["metadata"]["namespace"] == namespace]
        return {"items": [copy.deepcopy(raw) for raw in mine if raw["metadata"]["labels"].get(label) == value]}

    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(f"create {path}")
        raw = copy.deepcopy(dict(body))
        key = f"{raw['metadata']['namespace']}/{raw['metadata']['name']}"
        if key in self.jobs:
            raise KubeError(409, "already exists")
        raw["metadata"]["uid"] = f"00000000-0000-4000-8000-{next(self._numbers):012d}"
        raw["metadata"]["creationTimestamp"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.jobs[key] = raw
        self._show(raw)
        return copy.deepcopy(raw)

    async def merge(self, path: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        namespace, name = _parts(path)
        raw = self._find(namespace, name)
        raw["spec"].update(patch["spec"])
        self._show(raw)
        return copy.deepcopy(raw)

    async def delete(self, path: str, uid: str) -> None:
        self.deleted.append(f"{path}@{uid}")

    def _find(self, namespace: str, name: str) -> dict[str, Any]:
        if f"{namespace}/{name}" not in self.jobs:
            raise KubeError(404, "not found")
        return self.jobs[f"{namespace}/{name}"]

    def _show(self, raw: dict[str, Any]) -> None:
        for cache in self.caches if self.watching else ():
            cache.put(copy.deepcopy(raw))


def _parts(path: str) -> tuple[str, str]:
    _, _, rest = path.partition("/namespaces/")
    namespace, _, rest = rest.partition("/")
    return namespace, rest.partition("/")[2]


@dataclass
class TuningWorld:
    """Gateways in front of one store and one API server."""

    store: StoreProcess
    objects: FakeObjects
    gateways: list[World]

    @property
    def world(self) -> World:
        return self.gateways[0]

    def client(self, key: str = KEY, gateway: int = 0, **more: Any) -> openai.AsyncOpenAI:
        """The unmodified client, with a connection pool that the test closes."""
        return self.gateways[gateway].client(key, **more)

    async def upload(self, data: bytes = b"{}\n", key: str = KEY, name: str = "train.jsonl") -> str:
        """Uploads a file and returns its id."""
        async with self.client(key) as client:
            return (await client.files.create(file=(name, data), purpose="fine-tune")).id

    async def call(self, method: str, path: str, key: str = KEY, **more: Any) -> httpx2.Response:
        """A raw call."""
        headers = {"Authorization": f"Bearer {key}", **more.pop("headers", {})}
        async with httpx2.AsyncClient() as session:
            return await session.request(method, self.world.url + path, headers=headers, timeout=20, **more)


@asynccontextmanager
async def tuning_world(store: StoreProcess, *, gateways: int = 1, **settings: Any) -> AsyncIterator[TuningWorld]:
    """The base `tiny` of the namespace `models` may be tuned by team-a and team-b; `closed` by none."""
    async with AsyncExitStack() as stack:
        made = TuningWorld(store, FakeObjects(), [])
        for _ in range(gateways):
            here = await stack.enter_async_context(world(**settings))
            client = StoreClient(store.url, lambda: (MASTER,), ReleaseTrust())
            stack.push_async_callback(client.close)
            here.gateway.use_tuning(
                Tuning(
                    client,
                    Files(client),
                    Jobs(
                        made.objects,
                        [made.objects.cache()],
                        most_unfinished=here.settings.tuning_unfinished_jobs,
                    ),
                    made.objects,
                    here.routes,
                    UploadLimits(silence_s=here.settings.body_timeout_s, whole_s=here.settings.upload_timeout_s),
                )
            )
            keys = [
                api_key(KEY, f"{A},models", default_namespace=A, fine_tuning=True),
                api_key(OTHER_KEY, f"{B},models", default_namespace=B, fine_tuning=True),
                api_key(CHAT_KEY, f"{A},models", default_namespace=A),
            ]
            here.keys.publish(KeyTable.of(keys))
            here.base("tiny", "models", fineTuning={"enabled": True}, access={"namespaces": [A, B]})
            here.base("closed", "models", access={"namespaces": [A, B]})
            made.gateways.append(here)
        yield made
