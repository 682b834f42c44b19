"""A process that fills an API server with a large fleet, stands in for its runtimes, and counts what they are asked.

The objects and pods are real ones of the API server. Each runtime reports its adapters as registered; a PUT of an
adapter that it does not have loaded counts as a load, a DELETE as a move. Prints its port as JSON once everything
exists, then serves until it is ended. `GET /stats` has the counts, `POST /edit/{count}` suspends so many adapters,
`POST /age` begins a new count.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import ssl
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
from aiohttp import web

from lorapool_api.common import GROUP, LABEL_BASE, LABEL_BASE_UID, LABEL_MANAGED_BY
from lorapool_api.protocol import runtime_token, token_sha256
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge

NAMESPACE = "fleet"
BASE = "tiny"
OURS = f"/apis/{GROUP}/v1alpha1/namespaces/{NAMESPACE}"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
APPS = f"/apis/apps/v1/namespaces/{NAMESPACE}"
MASTER_TOKEN = "m" * 64
PINNED = 32
"""Adapters with minReplicas 1, which a restart must neither load again nor move."""
CONCURRENT = 32
MERGE = "application/merge-patch+json"


def digest_of(uri: str) -> str:
    return f"sha256:{hashlib.sha256(uri.encode()).hexdigest()}"


class Api:
    """A client with an administrator's rights."""

    def __init__(self, url: str, token: str, ca_file: str) -> None:
        self._url, self._token = url, token
        self._tls = ssl.create_default_context(cafile=ca_file)
        self._session: aiohttp.ClientSession | None = None
        self._free = asyncio.Semaphore(CONCURRENT)

    async def call(self, method: str, path: str, body: Any, content: str = "application/json") -> dict[str, Any]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls, limit=CONCURRENT))
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": content}
        async with self._free, self._session.request(method, self._url + path, json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {response.status} {answer.get('message')}")
            return answer

    async def own(self, kind: str, plural: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        body = {"apiVersion": f"{GROUP}/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        return await self.call("POST", f"{OURS}/{plural}", body)

    async def replica_set(self, base_uid: str) -> dict[str, Any]:
        """Creates the Deployment of the base and its ReplicaSet, as its controllers would; returns the latter."""
        labels, name = labels_of(base_uid), f"{BASE}-runtime"
        template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "runtime", "image": "none"}]}}
        spec = {"selector": {"matchLabels": labels}, "template": template}
        owner = {"apiVersion": f"{GROUP}/v1alpha1", "kind": "BaseModel", "name": BASE, "uid": base_uid}
        managed = {**labels, LABEL_MANAGED_BY: "lorapool-operator"}
        metadata = {"name": name, "labels": managed, "ownerReferences": [{**owner, "controller": True}]}
        made = await self.call("POST", f"{APPS}/deployments", {"metadata": metadata, "spec": spec})
        metadata = {"name": f"{name}-1", "labels": labels, "ownerReferences": [controller("Deployment", made)]}
        return await self.call("POST", f"{APPS}/replicasets", {"metadata": metadata, "spec": spec})

    async def pod(self, name: str, base_uid: str, replica_set: dict[str, Any], port: int) -> None:
        """Creates a ready runtime pod whose runtime listens on a port of this machine."""
        container = {"name": "runtime", "image": "none", "ports": [{"name": "http", "containerPort": port}]}
        owners = [controller("ReplicaSet", replica_set)]
        metadata = {"name": name, "labels": labels_of(base_uid), "ownerReferences": owners}
        spec = {"containers": [container], "automountServiceAccountToken": False, "nodeName": "nowhere"}
        await self.call("POST", f"{CORE}/pods", {"metadata": metadata, "spec": spec})
        status = {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        await self.call("PATCH", f"{CORE}/pods/{name}/status", {"status": status}, MERGE)


def labels_of(base_uid: str) -> dict[str, str]:
    return {LABEL_BASE: BASE, LABEL_BASE_UID: base_uid}


def controller(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
    metadata = raw["metadata"]
    named = {"apiVersion": "apps/v1", "kind": kind, "name": metadata["name"], "uid": metadata["uid"]}
    return {**named, "controller": True}


class FakeRuntime:
    """One pod's runtime, with reports that change only by PUT and DELETE."""

    def __init__(self, number: int, reports: Mapping[tuple[str, str], str], counts: Counter[str], token: str) -> None:
        """`token`: its bearer token, which it proves to know to each poller as the pod that is polled."""
        self.name = f"{BASE}-{number}"
        self._token_sha256 = token_sha256(token)
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
        answer = json.dumps(
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
        ).encode()
        challenge = Challenge.parse(request.headers.get("Authorization", ""))
        proof = challenge.answer(self._token_sha256, answer) if challenge is not None else ""
        return web.Response(body=answer, content_type="application/json", headers={HEADER_PROOF: proof})

    async def _put(self, request: web.Request) -> web.Response:
        key = (request.match_info["uid"], request.match_info["digest"])
        display = (await request.json())["display"]
        if self._reports.get(key, {}).get("state") != "loaded":
            self._counts["load"] += 1
            self._seq += 1
            self._reports[key] = self._report(key, display, loaded=True) | {"seq": self._seq}
            self._changed.set()
            self._changed = asyncio.Event()
        return web.json_response({"bootId": f"boot-{self.name}", "adapter": self._reports[key]})

    async def _remove(self, request: web.Request) -> web.Response:
        self._counts["move"] += 1
        self._reports.pop((request.match_info["uid"], request.match_info["digest"]), None)
        usage = {"bootID": f"boot-{self.name}"}
        answer = {"bootId": f"boot-{self.name}", "freedDeviceBytes": 0, "freedHostBytes": 0, "usage": usage}
        return web.json_response(answer)


class World:
    def __init__(self, api: Api, adapters: int) -> None:
        self._api = api
        self._adapters = adapters
        self._counts: Counter[str] = Counter()

    async def fill(self, pods: int, reports: int) -> None:
        """Creates everything; each runtime reports its own part of the adapters, around in a circle."""
        await self._api.call("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        await self._api.call("POST", f"{CORE}/serviceaccounts", {"metadata": {"name": "default"}})
        scaling = {"minReplicas": pods, "maxReplicas": 64}
        spec = {"source": {"uri": "hf://org/tiny"}, "replicas": pods, "scaling": scaling}
        base = await self._api.own("BaseModel", "basemodels", BASE, spec)
        keys = await asyncio.gather(*(self._adapter(number) for number in range(self._adapters)))
        replica_set = await self._api.replica_set(base["metadata"]["uid"])
        for number in range(pods):
            held = (keys[at % self._adapters] for at in range(number * reports, (number + 1) * reports))
            await self._runtime(number, base["metadata"]["uid"], replica_set, held)

    async def _adapter(self, number: int) -> tuple[tuple[str, str], str]:
        uri = f"hf://org/a{number}"
        pinned = {"minReplicas": 1} if number < PINNED else {}
        spec = {"baseModelRef": {"name": BASE}, "source": {"uri": uri}, **pinned}
        made = await self._api.own("LoraAdapter", "loraadapters", f"a{number}", spec)
        return (made["metadata"]["uid"], digest_of(uri)), f"{NAMESPACE}/a{number}"

    async def _runtime(
        self, number: int, base_uid: str, replica_set: dict[str, Any], held: Iterable[tuple[tuple[str, str], str]]
    ) -> None:
        runtime = FakeRuntime(number, dict(held), self._counts, runtime_token(MASTER_TOKEN, base_uid))
        await self._api.pod(runtime.name, base_uid, replica_set, await listen(runtime.app()))

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/stats", self._stats)
        app.router.add_post("/age", self._age)
        app.router.add_post("/edit/{count}", self._edit)
        return app

    async def _stats(self, _: web.Request) -> web.Response:
        return web.json_response(self._counts)

    async def _age(self, _: web.Request) -> web.Response:
        self._counts.clear()
        return web.json_response({})

    async def _edit(self, request: web.Request) -> web.Response:
        edited = range(PINNED, PINNED + int(request.match_info["count"]))
        patches = (
            self._api.call("PATCH", f"{OURS}/loraadapters/a{n}", {"spec": {"suspend": True}}, MERGE) for n in edited
        )
        await asyncio.gather(*patches)
        return web.json_response({})


async def listen(app: web.Application) -> int:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return int(runner.addresses[0][1])


async def serve(api: Api, adapters: int, pods: int, reports: int) -> None:
    world = World(api, adapters)
    await world.fill(pods, reports)
    print(json.dumps({"port": await listen(world.app())}), flush=True)
    await asyncio.Event().wait()


async def run(given: argparse.Namespace) -> None:
    await serve(Api(given.url, given.token, given.ca_file), given.adapters, given.pods, given.reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "token", "ca-file"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("adapters", "pods", "reports"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
