"""A gateway on a real socket with injected tables and fake runtimes, and a fake of the Kubernetes API."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
from aiohttp import web
from fakes import FakeRuntime, digest_of
from pydantic import TypeAdapter

from lorapool_api.common import AdapterKey
from lorapool_api.trust.tls import ReleaseTrust
from lorapool_api.usage_protocol import GatewayRecord
from lorapool_gateway.app import Gateway
from lorapool_gateway.ledger.attempts import Attempts
from lorapool_gateway.ledger.journal import Journal
from lorapool_gateway.ledger.segments import Chunk, Reader
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.process import client_session, key_guard
from lorapool_gateway.requests.attempt import RuntimeClient
from lorapool_gateway.requests.dispatch import Dispatcher
from lorapool_gateway.requests.http_client import HttpClient
from lorapool_gateway.routing.auth import ApiKey, KeyTable
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.objects import BaseRoute, Endpoint, ObjectRef, adapter_route, base_route, runtime_state
from lorapool_gateway.routing.routes import RouteTable, RuntimeReplica
from lorapool_gateway.settings import Settings

KEY = "lp-" + "k" * 43
OTHER_KEY = "lp-" + "o" * 43
RECORDS: TypeAdapter[list[GatewayRecord]] = TypeAdapter(list[GatewayRecord])
CREATED = "2026-01-01T00:00:00Z"


def parsed(chunk: Chunk) -> list[GatewayRecord]:
    """The records of a part of a journal, with their parties, as the ledger parses them."""
    records = json.loads(b"[%b]" % b",".join(chunk.bodies))
    for record in records:
        if "parties" in record:
            record |= json.loads(chunk.parties[record["parties"]])
    return RECORDS.validate_python(records)


async def until(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits for a condition that has no event of its own. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110  # the condition has no event of its own
            await asyncio.sleep(0.005)


async def until_it(true: Callable[[], Awaitable[bool]], timeout_s: float = 20.0) -> None:
    """`until` for a condition that is awaited."""
    async with asyncio.timeout(timeout_s):
        while not await true():  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.02)


async def cut_after(runtime: FakeRuntime, tokens: int) -> None:
    """Resets the runtime's connections once it has generated so many tokens of its last request."""
    await until(lambda: runtime.seen and runtime.seen[-1].completion_tokens >= tokens)
    assert runtime._runner is not None
    assert runtime._runner.server is not None
    for connection in runtime._runner.server.connections:
        if connection.transport is not None:
            connection.transport.abort()


def api_key(text: str, namespaces: str | None = None, **more: Any) -> ApiKey:
    """`namespaces` None: all."""
    names = None if namespaces is None else frozenset(namespaces.split(","))
    return ApiKey(id=text[:6], sha256=hashlib.sha256(text.encode()).hexdigest(), namespaces=names, **more)


def base_object(name: str = "tiny", namespace: str = "demo", created: str = CREATED, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"base-{namespace}-{name}",
            "creationTimestamp": created,
            "generation": 1,
            "resourceVersion": "1",
        },
        "spec": {"source": {"uri": "hf://org/tiny"}, "replicas": 1, **spec},
        "status": {"servedName": spec["servedName"]} if "servedName" in spec else {},
    }


def adapter_object(
    name: str,
    namespace: str = "demo",
    *,
    base: str = "tiny",
    base_namespace: str | None = None,
    created: str = CREATED,
    status: dict[str, Any] | None = None,
    generation: int = 1,
    uid: str | None = None,
    alias_granted: bool = True,
    **spec: Any,
) -> dict[str, Any]:
    """A LoraAdapter, Ready but not loaded unless a status is given, with its alias unless `alias_granted` is False."""
    found = ready_status(digest_of(name)) if status is None else status
    reference = {"name": base} if base_namespace is None else {"name": base, "namespace": base_namespace}
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-{namespace}-{name}",
            "creationTimestamp": created,
            "generation": generation,
            "resourceVersion": "1",
        },
        "spec": {"baseModelRef": reference, "source": {"uri": f"hf://org/{name}"}, **spec},
        "status": {**({"alias": spec["alias"]} if "alias" in spec and alias_granted else {}), **found},
    }


def ready_status(digest: str, **more: Any) -> dict[str, Any]:
    return {"observedGeneration": 1, "digest": digest, "conditions": [condition("Ready", "True", "Ready")], **more}


def failed_status(reason: str, message: str, **failure: Any) -> dict[str, Any]:
    return {
        "observedGeneration": 1,
        "conditions": [condition("Ready", "False", reason, message)],
        "failure": {"reason": reason, "message": message, **failure},
    }


def condition(kind: str, status: str, reason: str, message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": CREATED}


def key_of(name: str, namespace: str = "demo") -> AdapterKey:
    return AdapterKey(f"uid-{namespace}-{name}", digest_of(name))


@dataclass
class FakeWaker:
    """Records the bases that were woken."""

    woken: list[ObjectRef] = field(default_factory=list)

    def wake(self, base: BaseRoute, held: int) -> None:
        self.woken.append(base.ref)


@dataclass
class World:
    settings: Settings
    session: aiohttp.ClientSession
    journal: Journal
    trust: ReleaseTrust = field(default_factory=ReleaseTrust)
    routes: LiveRoutes = field(default_factory=LiveRoutes)
    keys: LiveKeys = field(default_factory=lambda: LiveKeys(KeyTable.of([api_key(KEY)])))
    metrics: Metrics = field(default_factory=Metrics)
    waker: FakeWaker = field(default_factory=FakeWaker)
    tokens: tuple[str, ...] = ("t" * 64,)
    """Bearer tokens of all runtimes, in the order in which the gateway tries them."""
    url: str = ""
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    replicas: dict[ObjectRef, list[RuntimeReplica]] = field(default_factory=dict)
    gateway: Gateway = field(init=False)
    http: HttpClient = field(init=False)
    runtimes: RuntimeClient = field(init=False)
    attempts: Attempts = field(init=False)

    def __post_init__(self) -> None:
        self.attempts = Attempts(self.journal)
        self.http = HttpClient(
            trust=self.trust, read_timeout_s=self.settings.request_timeout_s, before_write=self.attempts.write
        )
        self.runtimes = RuntimeClient(self.http, lambda base: self.tokens)
        guard = key_guard(self.settings, self.keys, self.metrics)
        dispatcher = Dispatcher(self.routes, self.waker, self.runtimes, self.metrics, guard, self.attempts)
        self.gateway = Gateway(self.settings, self.routes, guard, dispatcher, self.metrics, self.attempts)

    # --- what happens in the cluster

    def base(self, name: str = "tiny", namespace: str = "demo", **more: Any) -> None:
        self.bases[f"{namespace}/{name}"] = base_object(name, namespace, **more)
        self.publish()

    def adapter(self, name: str, namespace: str = "demo", **more: Any) -> AdapterKey:
        raw = adapter_object(name, namespace, **more)
        self.adapters[f"{namespace}/{name}"] = raw
        self.publish()
        return AdapterKey(raw["metadata"]["uid"], str(raw["status"].get("digest")))

    def replica(self, runtime: FakeRuntime | str, pod: str = "pod-a", base: str = "tiny", **more: Any) -> None:
        """Adds a ready pod of the base with the snapshot of this runtime, or an address where none listens."""
        url = runtime if isinstance(runtime, str) else runtime.url
        ref = ObjectRef("demo", base)
        endpoint = Endpoint(ref, f"base-demo-{base}", f"uid-{pod}", pod, url, ready=True, terminating=False)
        state = None if isinstance(runtime, str) else runtime_state(runtime.snapshot())
        kept = [item for item in self.replicas.get(ref, []) if item.endpoint.pod_name != pod]
        self.replicas[ref] = [*kept, replace(RuntimeReplica(endpoint, state, proven=True), **more)]
        self.publish()

    def gone(self, pod: str = "pod-a") -> None:
        for ref, replicas in self.replicas.items():
            self.replicas[ref] = [item for item in replicas if item.endpoint.pod_name != pod]
        self.publish()

    def publish(self) -> None:
        bases = [base_route(raw) for raw in self.bases.values()]
        adapters = [adapter_route(raw) for raw in self.adapters.values()]
        self.metrics.sync(
            [str(base.ref) for base in bases], {str(adapter.ref): str(adapter.base_ref) for adapter in adapters}
        )
        self.routes.publish(
            RouteTable.of(bases, adapters, {ref: tuple(replicas) for ref, replicas in self.replicas.items()})
        )

    # --- what a client does

    def client(self, key: str = KEY, **more: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **more)

    async def post(self, body: Any, *, path: str = "/v1/chat/completions", **more: Any) -> aiohttp.ClientResponse:
        """Sends a raw request and reads the whole response."""
        headers = {"Authorization": f"Bearer {KEY}", **more.pop("headers", {})}
        data = io.BytesIO(body) if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url + path, data=data, headers=headers, **more) as response:
            await response.read()
            return response

    def ask(self, model: str, text: str = "hello there", **more: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": text}], **more}

    def records(self) -> list[GatewayRecord]:
        """What the journal has at the end of the present turn of the event loop, as the ledger parses it."""
        self.attempts.write()
        return self.written()

    def written(self) -> list[GatewayRecord]:
        """What the journal has at this moment."""
        return parsed(Reader(self.journal.folder).read(self.journal.seq, 2**30, 2**30))

    def ends(self) -> list[tuple[str, int]]:
        """Outcome and status of each attempt, in the order in which they ended."""
        return [(record.outcome.value, record.code) for record in self.records() if record.kind == "closed"]

    def sample(self, name: str, **labels: str) -> float:
        """The value of one series of the gateway's metrics; 0 if there is none."""
        return self.metrics.registry.get_sample_value(f"lorapool_gateway_{name}", labels) or 0.0


@asynccontextmanager
async def world(*, trust: ReleaseTrust | None = None, **settings: Any) -> AsyncIterator[World]:
    """Checks at the end that every attempt was opened and closed once, whatever the test did."""
    async with AsyncExitStack() as stack:
        journal = Journal(Path(stack.enter_context(tempfile.TemporaryDirectory())), 2**28)
        stack.callback(journal.close)
        session = await stack.enter_async_context(client_session())
        made = World(Settings(keys_namespace="lorapool", **settings), session, journal, trust or ReleaseTrust())
        stack.push_async_callback(made.http.close)
        runner = web.ServerRunner(made.gateway.server(), shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield made
        await runner.cleanup()
        opened = [record.attempt for record in made.records() if record.kind == "opened"]
        closed = [record.attempt for record in made.records() if record.kind == "closed"]
        assert sorted(opened) == sorted(closed) == sorted(set(opened))


@dataclass
class FakeKube:
    """A few routes of the Kubernetes API whose faults can be forced: expired versions, silence, refusals.

    For what a real API server cannot be made to do on demand; all else is tested against a real one."""

    objects: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """{plural: {namespace/name: object}}"""
    refuse: int | None = None
    """Answer everything with this status."""
    missing: set[str] = field(default_factory=set)
    """Kinds, by their plural, that the cluster does not have."""
    silent: bool = False
    """Keep watches open but send nothing, not even bookmarks."""
    lists: list[str] = field(default_factory=list)
    watches: list[str] = field(default_factory=list)
    port: int = 0
    _version: int = 10
    _deleted: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _streams: dict[str, list[asyncio.Queue[dict[str, Any]]]] = field(default_factory=dict)

    def put(self, plural: str, raw: dict[str, Any]) -> None:
        stored = self.objects.setdefault(plural, {})
        name = _name(raw)
        self._version += 1
        raw["metadata"]["resourceVersion"] = str(self._version)
        self._send(plural, {"type": "MODIFIED" if name in stored else "ADDED", "object": raw})
        stored[name] = raw

    def delete(self, plural: str, name: str) -> None:
        self._version += 1
        raw = self.objects[plural].pop(name)
        raw["metadata"]["resourceVersion"] = str(self._version)
        self._deleted.append((plural, raw))
        self._send(plural, {"type": "DELETED", "object": raw})

    def expire(self, plural: str) -> None:
        """What a watcher gets whose version was compacted away."""
        error = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        for queue in self._streams.get(plural, []):
            queue.put_nowait({"type": "ERROR", "object": error})

    def kubeconfig(self, folder: Path) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(config))
        return path

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeKube]:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._get)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self.port = int(runner.addresses[0][1])
        try:
            yield self
        finally:
            await runner.cleanup()

    def _send(self, plural: str, event: dict[str, Any]) -> None:
        if not self.silent:
            for queue in self._streams.get(plural, []):
                queue.put_nowait(event)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        plural = request.path.rsplit("/", 1)[-1]
        if plural in self.missing:
            return web.json_response({"kind": "Status", "message": "no such resource"}, status=404)
        if self.refuse is not None:
            return web.json_response({"kind": "Status", "message": "refused"}, status=self.refuse)
        if request.query.get("watch") == "true":
            return await self._watch(request, plural)
        self.lists.append(plural)
        items = list(self.objects.get(plural, {}).values())
        first, size = int(request.query.get("continue", 0)), int(request.query.get("limit", 500))
        metadata = {"resourceVersion": str(self._version)}
        if first + size < len(items):
            metadata["continue"] = str(first + size)
        return web.json_response({"items": items[first : first + size], "metadata": metadata})

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        self.watches.append(plural)
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        since = int(request.query["resourceVersion"])
        for raw in self.objects.get(plural, {}).values():
            if int(raw["metadata"]["resourceVersion"]) > since and not self.silent:
                queue.put_nowait({"type": "MODIFIED", "object": raw})
        for raw in (raw for kind, raw in self._deleted if kind == plural):
            if int(raw["metadata"]["resourceVersion"]) > since and not self.silent:
                queue.put_nowait({"type": "DELETED", "object": raw})
        self._streams.setdefault(plural, []).append(queue)
        out = web.StreamResponse()
        await out.prepare(request)
        try:
            while True:
                event = await queue.get()
                await out.write(json.dumps(event).encode() + b"\n")
                if event["type"] == "ERROR":
                    return out
        finally:
            self._streams[plural].remove(queue)


def _name(raw: dict[str, Any]) -> str:
    return f"{raw['metadata']['namespace']}/{raw['metadata']['name']}"
