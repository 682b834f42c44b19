"""Everything the operator says to the API server, in a dozen calls.

Called by `apply`, `resync` and `__main__`. Writes are fenced: a process that has lost the Lease writes nothing.
Deletes and status patches carry the uid they were decided for, so a recreated object is never hit by mistake.

    ClusterError
    ├─ NotFound 404    ├─ Conflict 409 (also: uid or version moved on)
    ├─ Fenced (we are not the leader any more)
    └─ NotOurs (a child's name is taken by someone else's object)
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio.client.api_client import ApiClient

from lorapool_api.common import API_VERSION, FIELD_MANAGER, GROUP, LABEL_BASE, LABEL_MANAGED_BY, VERSION
from lorapool_operator.clock import iso, iso_micro
from lorapool_operator.decisions.manifests import MANAGED_BY, Manifest
from lorapool_operator.decisions.plan import Note
from lorapool_operator.merge import merge_patch
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Kind

log = logging.getLogger(__name__)

PAGE_ITEMS = 500
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PATHS = {
    "Deployment": ("apis/apps/v1", "deployments"),
    "Service": ("api/v1", "services"),
    "PodDisruptionBudget": ("apis/policy/v1", "poddisruptionbudgets"),
    "Pod": ("api/v1", "pods"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    Kind.BASE: (f"apis/{GROUP}/{VERSION}", "basemodels"),
    Kind.ADAPTER: (f"apis/{GROUP}/{VERSION}", "loraadapters"),
}
RUNTIME_SELECTOR = LABEL_BASE


class ClusterError(Exception):
    """The API server refused or could not be reached."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class NotFound(ClusterError):
    """The object is gone."""


class Conflict(ClusterError):
    """The object is not the one, or not the version, that this was decided for."""


class Fenced(ClusterError):
    """This process does not hold the Lease any more."""


class NotOurs(ClusterError):
    """An object of this name exists and is not Lorapool's."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom an Event is about."""

    kind: Kind
    namespace: str
    name: str
    uid: str
    resource_version: str


class Cluster:
    """One per process; owns no connection but the client it was given."""

    def __init__(
        self, client: ApiClient, *, timeout_s: float, identity: str, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._identity = identity
        self._may_write = may_write
        self.writes: dict[str, int] = {}
        """Writes by what was written, for the metrics."""

    # --- reads

    async def objects(
        self, kind: str, namespace: str | None, *, labels: str = "", metadata_only: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """All objects of a kind in one namespace, or in all, page by page."""
        token: str | None = ""
        headers = {"Accept": METADATA_ONLY} if metadata_only else {}
        while token is not None:
            query = [("limit", str(PAGE_ITEMS))]
            query += [("labelSelector", labels)] if labels else []
            query += [("continue", token)] if token else []
            page = await self._call("GET", _path(kind, namespace), query=query, headers=headers)
            for item in page.get("items") or ():
                yield item
            token = (page.get("metadata") or {}).get("continue") or None

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return await self._call("GET", _path(kind, namespace, name))

    # --- writes

    async def patch_status(self, held: BaseObject | AdapterObject, status: Mapping[str, Any]) -> dict[str, Any]:
        """One merge patch of /status with what differs; the answer is the new object."""
        kind = Kind.BASE if isinstance(held, BaseObject) else Kind.ADAPTER
        body = {"metadata": {"uid": held.meta.uid}, "status": merge_patch(held.status.dump(), status)}
        path = _path(kind, held.meta.namespace, held.meta.name) + "/status"
        return await self._write("status", "PATCH", path, body, content=MERGE, query=_MANAGER)

    async def scale(self, base: BaseObject, replicas: int) -> None:
        """Through the scale subresource, only over the very version that was decided on: a gateway may wake it now."""
        body = {"metadata": {"resourceVersion": base.meta.resource_version}, "spec": {"replicas": replicas}}
        path = _path(Kind.BASE, base.meta.namespace, base.meta.name) + "/scale"
        await self._write("scale", "PATCH", path, body, content=MERGE, query=_MANAGER)

    async def apply_child(self, manifest: Manifest) -> dict[str, Any]:
        """Server-side apply. Raises NotOurs rather than taking over a stranger."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta["namespace"], meta["name"])
        try:
            held = await self._call("GET", path)
        except NotFound:
            held = None
        if held is not None:
            await self._check_ours(manifest, held)
        query = [*_MANAGER, ("force", "true")]
        return await self._write("child", "PATCH", path, manifest, content=APPLY, query=query)

    async def _check_ours(self, manifest: Manifest, held: Mapping[str, Any]) -> None:
        meta = held["metadata"]
        told = f"{manifest['kind']} {meta['namespace']}/{meta['name']}"
        if (meta.get("labels") or {}).get(LABEL_MANAGED_BY) != MANAGED_BY:
            raise NotOurs(f"{told} exists and is not managed by Lorapool; rename it, or name the BaseModel otherwise.")
        wanted = manifest["metadata"]["ownerReferences"][0]["uid"]
        owners = {owner.get("uid") for owner in meta.get("ownerReferences") or ()}
        if owners and wanted not in owners:
            await self.delete(manifest["kind"], meta["namespace"], meta["name"], uid=meta["uid"])
            raise Conflict(f"{told} belongs to a former object of this name and is being deleted", 409)

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None:
        """Deletes exactly this object; one that is gone is fine."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        try:
            await self._write("delete", "DELETE", _path(kind, namespace, name), body, content="application/json")
        except NotFound:
            return

    async def put_lease(self, lease: Mapping[str, Any], *, create: bool) -> dict[str, Any]:
        """Creates the Lease, or replaces the very version that was read. Raises Conflict when someone was quicker."""
        meta = lease["metadata"]
        path = _path("Lease", meta["namespace"], "" if create else meta["name"])
        return await self._write("lease", "POST" if create else "PUT", path, lease, content="application/json")

    async def post_event(self, subject: Subject, note: Note, now: float) -> None:
        """One core/v1 Event; few are made, so nothing is aggregated."""
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{subject.name[:200]}.{uuid.uuid4().hex[:16]}", "namespace": subject.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": subject.kind.value,
                "namespace": subject.namespace,
                "name": subject.name,
                "uid": subject.uid,
                "resourceVersion": subject.resource_version,
            },
            "type": note.type.value,
            "reason": note.reason,
            "message": note.message[:1000],
            "firstTimestamp": iso(now),
            "lastTimestamp": iso(now),
            "eventTime": iso_micro(now),
            "count": 1,
            "action": note.reason,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": self._identity[:128],
        }
        await self._write("event", "POST", f"/api/v1/namespaces/{subject.namespace}/events", body, content="")

    # --- one call

    async def _write(
        self,
        what: str,
        method: str,
        path: str,
        body: Mapping[str, Any],
        *,
        content: str,
        query: list[Any] | None = None,
    ) -> dict[str, Any]:
        if not self._may_write():
            raise Fenced("the Lease is lost: nothing is written any more")
        self.writes[what] = self.writes.get(what, 0) + 1
        headers = {"Content-Type": content or "application/json"}
        return await self._call(method, path, body=body, query=query, headers=headers)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: list[Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        given = {"Accept": "application/json", **(headers or {})}
        try:
            async with asyncio.timeout(self._timeout_s):
                request = await self._client.param_serialize(
                    method,
                    path,
                    query_params=query or [],
                    header_params=given,
                    body=body,
                    auth_settings=["BearerToken"],
                )
                response = await self._client.call_api(*request)
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(f"{method} {path}: API server not reached: {type(error).__name__} {error}") from error
        if response.status >= 300:
            raise _error(method, path, response.status, raw)
        try:
            answer: dict[str, Any] = json.loads(raw) if raw else {}
        except ValueError as error:
            raise ClusterError(f"{method} {path}: the answer is no JSON", response.status) from error
        return answer


_MANAGER = [("fieldManager", FIELD_MANAGER)]


def _error(method: str, path: str, status: int, raw: bytes) -> ClusterError:
    try:
        told = json.loads(raw).get("message", "")
    except ValueError:
        told = raw[:200].decode(errors="replace")
    kind = {404: NotFound, 409: Conflict}.get(status, ClusterError)
    return kind(f"{method} {path}: {status} {told}", status)


def _path(kind: str, namespace: str | None, name: str = "") -> str:
    root, plural = PATHS[kind]
    middle = f"/namespaces/{namespace}" if namespace is not None else ""
    return f"/{root}{middle}/{plural}" + (f"/{name}" if name else "")
