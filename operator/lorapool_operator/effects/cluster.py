"""All requests of the operator to the API server.

Writes are fenced: a process that has lost the Lease writes nothing. All requests of one client share a rate limit.
Deletes carry the uid of the object that they were decided for, status patches and scales its version, so that they
never affect a recreated object of the same name.

    ClusterError
    ├─ ObjectNotFoundError (404)
    ├─ ObjectConflictError (409: the object has another uid or version by now)
    └─ ForeignObjectError (the name of a child belongs to an object of others)
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import aiohttp
from kubernetes.aio.client.api_client import ApiClient

from lorapool_api.common import API_VERSION, FIELD_MANAGER, GROUP, LABEL_BASE, LABEL_MANAGED_BY, VERSION
from lorapool_operator.clock import iso, iso_micro
from lorapool_operator.decisions.plan import KubeEvent
from lorapool_operator.decisions.pods import MANAGED_BY, Manifest
from lorapool_operator.effects.fence import Fence
from lorapool_operator.effects.rate_limit import RateLimit
from lorapool_operator.world.cluster_cache import LEADER_WORKER_SET, AdapterObject, BaseObject, Key, ObjectKind

log = logging.getLogger(__name__)

PAGE_ITEMS = 500
RETRY_AFTER_MAX_S = 60.0
"""A longer wait is cut to this, so that a wrong answer of a proxy does not stop the operator."""
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PATHS = {
    "Deployment": ("apis/apps/v1", "deployments"),
    "ReplicaSet": ("apis/apps/v1", "replicasets"),
    "StatefulSet": ("apis/apps/v1", "statefulsets"),
    LEADER_WORKER_SET: ("apis/leaderworkerset.x-k8s.io/v1", "leaderworkersets"),
    "ConfigMap": ("api/v1", "configmaps"),
    "PersistentVolumeClaim": ("api/v1", "persistentvolumeclaims"),
    "Secret": ("api/v1", "secrets"),
    "Service": ("api/v1", "services"),
    "PodDisruptionBudget": ("apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("apis/networking.k8s.io/v1", "networkpolicies"),
    "Pod": ("api/v1", "pods"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    ObjectKind.BASE: (f"apis/{GROUP}/{VERSION}", "basemodels"),
    "Job": ("apis/batch/v1", "jobs"),
    ObjectKind.ADAPTER: (f"apis/{GROUP}/{VERSION}", "loraadapters"),
    ObjectKind.TUNING: (f"apis/{GROUP}/{VERSION}", "finetunejobs"),
}
RUNTIME_SELECTOR = LABEL_BASE
OPTIONAL = frozenset({LEADER_WORKER_SET})
"""Kinds that a cluster need not have."""


class ClusterError(Exception):
    """The API server refused a request or could not be reached; `status` is 0 if there was no response."""

    def __init__(self, message: str, status: int = 0, detail: str = "", *, retry_after_s: float = 0.0) -> None:
        """`detail` is the API server's own message, `retry_after_s` the wait that it asked for."""
        super().__init__(message)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s


class ObjectNotFoundError(ClusterError):
    """The object does not exist."""


class ObjectConflictError(ClusterError):
    """The object has another uid or version than the one that the request was decided for."""


class ForeignObjectError(ClusterError):
    """An object of this name exists and is not managed by Lorapool."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The object that an Event is about."""

    kind: str
    namespace: str
    name: str
    uid: str = ""
    resource_version: str = ""
    api_version: str = API_VERSION


class Page(NamedTuple):
    """A part of a listing."""

    version: str
    """The version of the cluster's state that all pages of the listing show."""
    items: list[dict[str, Any]]


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON merge patch (RFC 7386) from one document to another; a list is replaced as a whole."""
    patch: dict[str, Any] = {name: None for name in before if name not in after}
    for name, value in after.items():
        old = before.get(name)
        if name in before and old == value:
            continue
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            patch[name] = merge_patch(old, value)
        else:
            patch[name] = value
    return patch


class PlanTarget(Protocol):
    """The requests that applying a plan makes; `make serve` answers them without an API server."""

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]: ...

    async def patch_status(self, item: BaseObject | AdapterObject, status: Mapping[str, Any]) -> dict[str, Any]: ...

    async def patch_raw_status(self, key: Key, version: str, patch: Mapping[str, Any]) -> dict[str, Any]: ...

    async def scale(self, base: BaseObject, replicas: int) -> None: ...

    async def annotate_pod(self, namespace: str, name: str, annotations: Mapping[str, str]) -> None: ...

    async def apply_child(self, manifest: Manifest) -> dict[str, Any]: ...

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None: ...

    async def post_event(self, subject: Subject, event: KubeEvent, now: float) -> None: ...

    async def refused_pods(self, namespace: str, owner_uid: str) -> str: ...


class Cluster:
    """The requests over one client, which the caller owns and closes."""

    def __init__(
        self,
        client: ApiClient,
        *,
        timeout_s: float,
        identity: str,
        fence: Fence | None = None,
        rate_limit: RateLimit | None = None,
    ) -> None:
        """Without a fence every write is allowed; without a limit requests are sent at once."""
        self._client = client
        self._timeout_s = timeout_s
        self._identity = identity
        self._fence = fence or Fence()
        self._rate_limit = rate_limit or RateLimit()
        self.writes: dict[str, int] = {}
        """Number of writes by what was written, for the metrics."""

    # --- reads

    async def pages(
        self, kind: str, namespace: str | None, *, labels: str = "", metadata_only: bool = False
    ) -> AsyncIterator[Page]:
        """Yields all objects of a kind in one namespace, or in all if it is None, page by page. Raises ClusterError.

        Of an optional kind that the cluster does not have there are none.
        """
        token: str | None = ""
        headers = {"Accept": METADATA_ONLY} if metadata_only else {}
        while token is not None:
            query = [("limit", str(PAGE_ITEMS))]
            query += [("labelSelector", labels)] if labels else []
            query += [("continue", token)] if token else []
            try:
                page = await self._call("GET", _path(kind, namespace), query=query, headers=headers)
            except ObjectNotFoundError:
                if kind not in OPTIONAL:
                    raise
                return
            meta = page.get("metadata") or {}
            yield Page(str(meta.get("resourceVersion", "")), page.get("items") or [])
            token = meta.get("continue") or None

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        """Reads one object. Raises ObjectNotFoundError."""
        return await self._call("GET", _path(kind, namespace, name))

    async def refused_pods(self, namespace: str, owner_uid: str) -> str:
        """Returns why the API server refuses the pods of a StatefulSet, by its controller's last event; empty for none.

        The chart grants the right to list events where a profile has several nodes; without it nothing is known.
        Raises ClusterError.
        """
        fields = f"involvedObject.uid={owner_uid},reason=FailedCreate"
        query = [("fieldSelector", fields), ("limit", str(PAGE_ITEMS))]
        try:
            page = await self._call("GET", f"/api/v1/namespaces/{namespace}/events", query=query, headers={})
        except ClusterError as error:
            if error.status != 403:
                raise
            return ""
        events = sorted(page.get("items") or [], key=lambda item: str(item.get("lastTimestamp") or ""))
        return f"FailedCreate: {events[-1].get('message', '')}"[:500] if events else ""

    # --- writes

    async def patch_status(self, item: BaseObject | AdapterObject, status: Mapping[str, Any]) -> dict[str, Any]:
        """Patches what differs in /status and returns the new object.

        Raises ObjectConflictError if the object has another version by now. The uid would be no precondition here: the
        API server ignores it in a patch of /status.
        """
        return await self.patch_raw_status(
            item.key, item.meta.resource_version, merge_patch(item.status.dump(), status)
        )

    async def patch_raw_status(self, key: Key, version: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        """Applies a merge patch to the /status of this version of an object. Raises ObjectConflictError."""
        body = {"metadata": {"resourceVersion": version}, "status": patch}
        path = _path(key.kind, key.namespace, key.name) + "/status"
        return await self._write("status", "PATCH", path, body, content=MERGE, query=_MANAGER)

    async def scale(self, base: BaseObject, replicas: int) -> None:
        """Sets the replicas through the scale subresource.

        Raises ObjectConflictError if the object has another version by now: a gateway may have just woken the base.
        """
        body = {"metadata": {"resourceVersion": base.meta.resource_version}, "spec": {"replicas": replicas}}
        path = _path(ObjectKind.BASE, base.meta.namespace, base.meta.name) + "/scale"
        await self._write("scale", "PATCH", path, body, content=MERGE, query=_MANAGER)

    async def annotate_pod(self, namespace: str, name: str, annotations: Mapping[str, str]) -> None:
        """Sets annotations of a pod. A missing pod is no error."""
        body = {"metadata": {"annotations": annotations}}
        try:
            await self._write("pod", "PATCH", _path("Pod", namespace, name), body, content=MERGE, query=_MANAGER)
        except ObjectNotFoundError:
            return

    async def apply_child(self, manifest: Manifest) -> dict[str, Any]:
        """Applies a child by server-side apply. Raises ForeignObjectError if others own an object of this name."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta["namespace"], meta["name"])
        try:
            existing = await self._call("GET", path)
        except ObjectNotFoundError:
            existing = None
        if existing is not None:
            await self._check_owned(manifest, existing)
        query = [*_MANAGER, ("force", "true")]
        return await self._write("child", "PATCH", path, manifest, content=APPLY, query=query)

    async def create(self, manifest: Manifest) -> dict[str, Any]:
        """Creates an object. Raises ObjectConflictError if one of this name exists."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        return await self._write("child", "POST", path, manifest, content="application/json", query=_MANAGER)

    async def patch_data(
        self, kind: str, namespace: str, name: str, version: str, data: Mapping[str, str]
    ) -> dict[str, Any]:
        """Sets keys of the `data` of this version of an object. Raises ObjectConflictError, ObjectNotFoundError."""
        body = {"metadata": {"resourceVersion": version}, "data": data}
        path = _path(kind, namespace, name)
        return await self._write("data", "PATCH", path, body, content=MERGE, query=_MANAGER)

    async def set_finalizers(self, key: Key, version: str, finalizers: Sequence[str]) -> dict[str, Any]:
        """Replaces the finalizers of this version of an object. Raises ObjectConflictError."""
        body = {"metadata": {"resourceVersion": version, "finalizers": list(finalizers)}}
        path = _path(key.kind, key.namespace, key.name)
        return await self._write("finalizers", "PATCH", path, body, content=MERGE, query=_MANAGER)

    async def _check_owned(self, manifest: Manifest, existing: Mapping[str, Any]) -> None:
        meta = existing["metadata"]
        name = f"{manifest['kind']} {meta['namespace']}/{meta['name']}"
        if (meta.get("labels") or {}).get(LABEL_MANAGED_BY) != MANAGED_BY:
            raise ForeignObjectError(f"{name} exists and is not managed by Lorapool; rename it or the BaseModel.")
        wanted = {owner["uid"] for owner in manifest["metadata"]["ownerReferences"]}
        owners = {owner.get("uid") for owner in meta.get("ownerReferences") or ()}
        if owners and not wanted & owners:
            await self.delete(manifest["kind"], meta["namespace"], meta["name"], uid=meta["uid"])
            raise ObjectConflictError(f"{name} belongs to deleted BaseModels alone and is being deleted", 409)

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None:
        """Deletes the object if it has this uid. A missing object is no error. Raises ObjectConflictError."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        try:
            await self._write("delete", "DELETE", _path(kind, namespace, name), body, content="application/json")
        except ObjectNotFoundError:
            return

    async def put_lease(self, lease: Mapping[str, Any], *, create: bool) -> dict[str, Any]:
        """Creates the Lease, or replaces the version that was read. Raises ObjectConflictError if it changed since."""
        meta = lease["metadata"]
        path = _path("Lease", meta["namespace"], "" if create else meta["name"])
        return await self._write("lease", "POST" if create else "PUT", path, lease, content="application/json")

    async def post_event(self, subject: Subject, event: KubeEvent, now: float) -> None:
        """Creates a core/v1 Event. There are so few that they are not aggregated."""
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{subject.name[:200]}.{uuid.uuid4().hex[:16]}", "namespace": subject.namespace},
            "involvedObject": {
                "apiVersion": subject.api_version,
                "kind": subject.kind,
                "namespace": subject.namespace,
                "name": subject.name,
                "uid": subject.uid,
                "resourceVersion": subject.resource_version,
            },
            "type": event.type.value,
            "reason": event.reason,
            "message": event.message[:1000],
            "firstTimestamp": iso(now),
            "lastTimestamp": iso(now),
            "eventTime": iso_micro(now),
            "count": 1,
            "action": event.reason,
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
        headers = {"Content-Type": content or "application/json"}
        return await self._call(method, path, body=body, query=query, headers=headers, writes=what)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: list[Any] | None = None,
        headers: Mapping[str, str] | None = None,
        writes: str = "",
    ) -> dict[str, Any]:
        accept = {"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        await self._rate_limit.acquire()
        if writes:
            self._fence.check()  # after the wait, in which the Lease may have been lost
            self.writes[writes] = self.writes.get(writes, 0) + 1
        try:
            async with asyncio.timeout(self._timeout_s):
                # without the body, which is JSON already: the client would copy it value by value
                _, url, made_headers, *_ = await self._client.param_serialize(
                    method, path, query_params=query or [], header_params=accept, auth_settings=["BearerToken"]
                )
                response = await self._client.call_api(method, url, made_headers, body)
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(
                f"{method} {path}: the API server cannot be reached: {type(error).__name__} {error}"
            ) from error
        if response.status >= 300:
            wait_s = retry_after_s(response.status, response.headers)
            self._rate_limit.pause(wait_s)
            raise _error(method, path, response.status, raw, wait_s)
        try:
            parsed: dict[str, Any] = json.loads(raw) if raw else {}
        except ValueError as error:
            raise ClusterError(f"{method} {path}: the response is not JSON", response.status) from error
        return parsed


_MANAGER = [("fieldManager", FIELD_MANAGER)]


def retry_after_s(status: int, headers: Mapping[str, str] | None) -> float:
    """Returns how many seconds an overloaded API server asks its client to wait; 0 if it does not.

    Kubernetes sends whole seconds; the header's other form, a date, is ignored.
    """
    text = (headers or {}).get("Retry-After") or ""
    if status not in (429, 503) or not text.isascii() or not text.isdecimal():
        return 0.0
    return min(float(text), RETRY_AFTER_MAX_S)


def _error(method: str, path: str, status: int, raw: bytes, wait_s: float) -> ClusterError:
    try:
        message = json.loads(raw).get("message", "")
    except ValueError:
        message = raw[:200].decode(errors="replace")
    kind = {404: ObjectNotFoundError, 409: ObjectConflictError}.get(status, ClusterError)
    return kind(f"{method} {path}: {status} {message}", status, message, retry_after_s=wait_s)


def plural_of(kind: str) -> str:
    """Returns the name of a kind in paths."""
    return PATHS[kind][1]


def _path(kind: str, namespace: str | None, name: str = "") -> str:
    root, plural = PATHS[kind]
    middle = f"/namespaces/{namespace}" if namespace is not None else ""
    return f"/{root}{middle}/{plural}" + (f"/{name}" if name else "")
