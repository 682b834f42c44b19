"""A few routes of the Kubernetes API whose faults can be forced: expired versions, silence, refusals.

Used by the gateway's tests where a real API server cannot be made to fail on demand; all else runs against the
real one. Speaks list and watch of JSON objects, nothing more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web


@dataclass
class FakeKube:
    objects: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """{plural: {namespace/name: object}}"""
    refuse: int | None = None
    """Answer everything with this status."""
    silent: bool = False
    """Keep watches open but send nothing, not even bookmarks."""
    lists: list[str] = field(default_factory=list)
    watches: list[str] = field(default_factory=list)
    port: int = 0
    _version: int = 10
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
