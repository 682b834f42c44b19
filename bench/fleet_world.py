"""A process that stands in for the API server and the runtimes of a large fleet, and counts what an operator does.

The API server lists in pages, watches, patches with resource versions and answers discovery, over plain HTTP and
without checks. Each runtime reports its adapters as registered; a PUT of an adapter that it does not have loaded counts
as a load. Prints its port as JSON, then serves until it is ended. `GET /stats` has the counts; `POST /edit/{count}`
suspends so many adapters, `POST /age` begins a new count.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

NAMESPACE = "fleet"
BASE = "tiny"
GROUP = "lorapool.dev"
PATHS = {
    "basemodels": f"/apis/{GROUP}/v1alpha1",
    "loraadapters": f"/apis/{GROUP}/v1alpha1",
    "pods": "/api/v1",
    "services": "/api/v1",
    "events": "/api/v1",
    "deployments": "/apis/apps/v1",
    "poddisruptionbudgets": "/apis/policy/v1",
    "leases": "/apis/coordination.k8s.io/v1",
}
VERBS = ["get", "list", "watch", "patch", "create", "delete"]
PINNED = 32
"""Adapters with minReplicas 1, which a restart must neither load again nor move."""


def digest_of(uri: str) -> str:
    return f"sha256:{hashlib.sha256(uri.encode()).hexdigest()}"


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


class Objects:
    """All objects by plural, with versions and watches."""

    def __init__(self) -> None:
        self._version = itertools.count(1)
        self.items: dict[str, dict[str, dict[str, Any]]] = {plural: {} for plural in PATHS}
        self._watches: dict[str, set[asyncio.Queue[bytes]]] = {plural: set() for plural in PATHS}
        self.version = 0

    def put(self, plural: str, item: dict[str, Any]) -> dict[str, Any]:
        kind = "MODIFIED" if item["metadata"]["name"] in self.items[plural] else "ADDED"
        self.version = next(self._version)
        item["metadata"]["resourceVersion"] = str(self.version)
        self.items[plural][item["metadata"]["name"]] = item
        event = json.dumps({"type": kind, "object": item}).encode() + b"\n"
        for queue in self._watches[plural]:
            queue.put_nowait(event)
        return item

    async def watch(self, plural: str) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._watches[plural].add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watches[plural].discard(queue)


class FakeApiServer:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.counts: Counter[str] = Counter()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/api", self._core)
        app.router.add_get("/apis", self._groups)
        app.router.add_get("/api/v1", self._resources)
        app.router.add_get("/apis/{group}/{version}", self._resources)
        for root in ("/api/v1", "/apis/{group}/{version}"):
            path = root + "/namespaces/{namespace}/{plural}"
            app.router.add_get(path, self._list)
            app.router.add_post(path, self._create)
            app.router.add_get(path + "/{name}", self._get)
            app.router.add_put(path + "/{name}", self._replace)
            app.router.add_patch(path + "/{name}", self._patch)
            app.router.add_patch(path + "/{name}/{sub}", self._patch)
            app.router.add_delete(path + "/{name}", self._delete)
        return app

    async def _core(self, _: web.Request) -> web.Response:
        return web.json_response({"versions": ["v1"]})

    async def _groups(self, _: web.Request) -> web.Response:
        roots = sorted({path.removeprefix("/apis/") for path in PATHS.values() if path != "/api/v1"})
        groups = [root.split("/") for root in roots]
        return web.json_response(
            {
                "groups": [
                    {"name": group, "versions": [{"version": version}], "preferredVersion": {"version": version}}
                    for group, version in groups
                ]
            }
        )

    async def _resources(self, request: web.Request) -> web.Response:
        found = [
            {"name": plural, "kind": plural, "singularName": plural, "namespaced": True, "verbs": VERBS}
            for plural, path in PATHS.items()
            if path == request.path
        ]
        return web.json_response({"resources": found})

    async def _list(self, request: web.Request) -> web.StreamResponse:
        plural, query = request.match_info["plural"], request.query
        if query.get("watch") == "true":
            return await self._watch(request, plural)
        items = list(self._objects.items[plural].values())
        begin, limit = int(query.get("continue") or 0), int(query.get("limit") or len(items) or 1)
        page = items[begin : begin + limit]
        if "PartialObjectMetadataList" in request.headers.get("Accept", ""):
            page = [{"metadata": item["metadata"]} for item in page]
        more = str(begin + limit) if begin + limit < len(items) else ""
        return web.json_response(
            {"metadata": {"resourceVersion": str(self._objects.version), "continue": more}, "items": page}
        )

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for event in self._objects.watch(plural):
            await response.write(event)
        return response

    async def _get(self, request: web.Request) -> web.Response:
        found = self._objects.items[request.match_info["plural"]].get(request.match_info["name"])
        return web.json_response(found) if found is not None else web.json_response({"message": "none"}, status=404)

    async def _create(self, request: web.Request) -> web.Response:
        plural = request.match_info["plural"]
        self.counts[f"create {plural}"] += 1
        return web.json_response(self._objects.put(plural, await request.json()), status=201)

    async def _replace(self, request: web.Request) -> web.Response:
        return web.json_response(self._objects.put(request.match_info["plural"], await request.json()))

    async def _delete(self, request: web.Request) -> web.Response:
        self.counts[f"delete {request.match_info['plural']}"] += 1
        return web.json_response({})

    async def _patch(self, request: web.Request) -> web.Response:
        plural, name, sub = (request.match_info.get(part, "") for part in ("plural", "name", "sub"))
        patch = await request.json()
        held = self._objects.items[plural].get(name)
        if held is None:  # server-side apply of a child
            patch["metadata"].setdefault("uid", f"{plural}-{name}")
            return web.json_response(self._objects.put(plural, patch))
        wanted = patch.get("metadata", {}).pop("resourceVersion", None)
        if wanted not in (None, held["metadata"]["resourceVersion"]):
            return web.json_response({"message": "another version"}, status=409)
        self.counts[f"{sub or 'apply'} {plural}"] += 1
        return web.json_response(self._objects.put(plural, merged(held, patch)))


class FakeRuntime:
    """One pod's runtime, with reports that change only by PUT and DELETE."""

    def __init__(self, number: int, reports: Mapping[tuple[str, str], str], counts: Counter[str]) -> None:
        self.name = f"{BASE}-{number}"
        self._counts = counts
        self._reports = {key: self._report(key, display) for key, display in reports.items()}
        self._seq = 1
        self._changed = asyncio.Event()

    def _report(self, key: tuple[str, str], display: str, *, loaded: bool = False) -> dict[str, Any]:
        return {
            "uid": key[0],
            "digest": key[1],
            "display": display,
            "state": "loaded" if loaded else "registered",
            "tier": "device" if loaded else "disk",
            "pinned": loaded,
            "sinceUnixS": 1.0,
            "usage": {"bootID": f"boot-{self.name}"},
        }

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/runtime", self._runtime)
        app.router.add_put("/v1/adapters/{uid}/{digest}", self._put)
        app.router.add_delete("/v1/adapters/{uid}/{digest}", self._remove)
        return app

    async def _runtime(self, request: web.Request) -> web.Response:
        query = request.query
        same = query.get("boot") == f"boot-{self.name}"
        if same and int(query.get("after", 0)) >= self._seq:
            try:
                async with asyncio.timeout(float(query.get("wait", 0))):
                    await self._changed.wait()
            except TimeoutError:
                pass
        after = int(query.get("after", 0)) if same else 0
        changed = [report for report in self._reports.values() if not after or report.get("seq", 0) > after]
        return web.json_response(
            {
                "seq": self._seq,
                "bootId": f"boot-{self.name}",
                "startedUnixS": 1.0,
                "base": {"servedName": BASE, "digest": digest_of("base"), "maxModelLen": 512, "dtype": "bfloat16"},
                "ready": True,
                "slotsTotal": 64,
                "slotsUsed": 0,
                "maxRank": 64,
                "full": not after,
                "adapters": changed,
            }
        )

    async def _put(self, request: web.Request) -> web.Response:
        key = (request.match_info["uid"], request.match_info["digest"])
        display = (await request.json())["display"]
        if self._reports.get(key, {}).get("state") != "loaded":
            self._counts["runtime load"] += 1
            self._seq += 1
            self._reports[key] = self._report(key, display, loaded=True) | {"seq": self._seq}
            self._changed.set()
            self._changed = asyncio.Event()
        return web.json_response({"bootId": f"boot-{self.name}", "adapter": self._reports[key]})

    async def _remove(self, request: web.Request) -> web.Response:
        self._counts["runtime delete"] += 1
        self._reports.pop((request.match_info["uid"], request.match_info["digest"]), None)
        usage = {"bootID": f"boot-{self.name}"}
        answer = {"bootId": f"boot-{self.name}", "freedDeviceBytes": 0, "freedHostBytes": 0, "usage": usage}
        return web.json_response(answer)


class World:
    def __init__(self, adapters: int, pods: int, reports: int) -> None:
        self.objects = Objects()
        self.api = FakeApiServer(self.objects)
        self._base = self._object("basemodels", BASE, {"source": {"uri": "hf://org/tiny"}, "replicas": pods} | SCALING)
        keys = [self._adapter(number) for number in range(adapters)]
        self.runtimes = [
            FakeRuntime(
                number,
                {
                    keys[at % adapters]: f"{NAMESPACE}/a{at % adapters}"
                    for at in range(number * reports, (number + 1) * reports)
                },
                self.api.counts,
            )
            for number in range(pods)
        ]

    def _object(self, plural: str, name: str, spec: dict[str, Any], **more: Any) -> dict[str, Any]:
        meta = {
            "namespace": NAMESPACE, "name": name, "uid": f"{plural}-{name}-uid", "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z", **more.pop("metadata", {}),
        }  # fmt: skip
        return self.objects.put(plural, {"metadata": meta, "spec": spec, **more})

    def _adapter(self, number: int) -> tuple[str, str]:
        uri = f"hf://org/a{number}"
        spec = {"baseModelRef": {"name": BASE}, "source": {"uri": uri}} | (
            {"minReplicas": 1} if number < PINNED else {}
        )
        made = self._object("loraadapters", f"a{number}", spec)
        return made["metadata"]["uid"], digest_of(uri)

    def add_pod(self, name: str, port: int) -> None:
        labels = {f"{GROUP}/base": BASE, f"{GROUP}/base-uid": self._base["metadata"]["uid"]}
        self._object(
            "pods",
            name,
            {"containers": [{"ports": [{"name": "http", "containerPort": port}]}]},
            metadata={"labels": labels},
            status={"phase": "Running", "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
        )

    async def stats(self, _: web.Request) -> web.Response:
        adapters = self.objects.items["loraadapters"].values()
        known = sum(
            1 for item in adapters if item.get("status", {}).get("observedGeneration") == item["metadata"]["generation"]
        )
        return web.json_response({"known": known, "counts": self.api.counts})

    async def age(self, _: web.Request) -> web.Response:
        self.api.counts.clear()
        return web.json_response({})

    async def edit(self, request: web.Request) -> web.Response:
        for number in range(PINNED, PINNED + int(request.match_info["count"])):
            item = self.objects.items["loraadapters"][f"a{number}"]
            item["spec"] = {**item["spec"], "suspend": True}
            item["metadata"] = {**item["metadata"], "generation": 2}
            self.objects.put("loraadapters", item)
        return web.json_response({})


SCALING = {"scaling": {"minReplicas": 1, "maxReplicas": 64}}


async def listen(app: web.Application) -> int:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return int(runner.addresses[0][1])


async def serve(adapters: int, pods: int, reports: int) -> None:
    world = World(adapters, pods, reports)
    for runtime in world.runtimes:
        world.add_pod(runtime.name, await listen(runtime.app()))
    app = world.api.app()
    app.router.add_get("/stats", world.stats)
    app.router.add_post("/age", world.age)
    app.router.add_post("/edit/{count}", world.edit)
    print(json.dumps({"port": await listen(app)}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("adapters", "pods", "reports"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    asyncio.run(serve(given.adapters, given.pods, given.reports))


if __name__ == "__main__":
    main()
