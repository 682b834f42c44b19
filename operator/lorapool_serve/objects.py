"""The objects in memory, with the few rules of an API server that operator and gateway rely on.

It is the gateway's `ObjectSource` and `ScaleClient`, and the operator's `PlanTarget`.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from lorapool_api import basemodel, loraadapter
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.routing.source import Kind, ObjectCache, ScaleResult, ref_of, scaled_up
from lorapool_operator.decisions.plan import KubeEvent
from lorapool_operator.effects.cluster import ObjectConflictError, ObjectNotFoundError, Subject
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Key

BASE, ADAPTER = basemodel.KIND, loraadapter.KIND
DEPLOYMENT, CONFIG_MAP, POD = "Deployment", "ConfigMap", "Pod"
REPLICA_SET, SECRET = "ReplicaSet", "Secret"
KIND_OF = {
    Kind.BASES: BASE,
    Kind.ADAPTERS: ADAPTER,
    Kind.PODS: POD,
    Kind.REPLICA_SETS: REPLICA_SET,
    Kind.DEPLOYMENTS: DEPLOYMENT,
    Kind.STATEFUL_SETS: "StatefulSet",
    Kind.LEADER_WORKER_SETS: "LeaderWorkerSet",
    Kind.API_KEYS: SECRET,
}
IMMUTABLE = {BASE: "source", ADAPTER: "baseModelRef"}
"""A file that changes this field of the spec replaces the object; kubectl would have to delete and create it."""

Raw = dict[str, Any]
Listener = Callable[[Raw, bool], None]
"""(object, whether it was deleted)."""
T = TypeVar("T")


class Objects:
    """All objects by kind, and the listeners that each change of a kind is reported to."""

    def __init__(self, report: Callable[[KubeEvent, Subject], None] = lambda event, subject: None) -> None:
        """`report` receives the operator's Events."""
        self._report = report
        self._objects: dict[str, dict[ObjectRef, Raw]] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self._version = 0

    def of(self, kind: str) -> list[Raw]:
        return list(self._objects.get(kind, {}).values())

    def listen(self, kind: str, listener: Listener) -> None:
        """Reports the objects that exist, then every change."""
        self._listeners.setdefault(kind, []).append(listener)
        for raw in self.of(kind):
            listener(raw, False)

    def put(self, raw: Mapping[str, Any]) -> None:
        """Creates or replaces an object. Status and replicas of one that exists are kept: others write them."""
        kind, ref = raw["kind"], ref_of(raw)
        before = self._objects.get(kind, {}).get(ref)
        field = IMMUTABLE.get(kind)
        if before is not None and field is not None and before["spec"].get(field) != raw["spec"].get(field):
            self.delete_object(kind, ref)
            before = None
        after: Raw = {**raw, "metadata": {**raw["metadata"]}}
        if before is None:
            now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            created = {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1}
            after["metadata"] = {**created, **after["metadata"]}
        else:
            kept = {name: before["metadata"][name] for name in ("uid", "creationTimestamp", "generation")}
            after["metadata"] |= kept
            after.setdefault("status", before.get("status", {}))
            if kind == BASE and "replicas" in before["spec"]:
                after["spec"] = {"replicas": before["spec"]["replicas"], **after["spec"]}
            after["metadata"]["generation"] += after.get("spec") != before.get("spec")
        self._store(after)

    def delete_object(self, kind: str, ref: ObjectRef) -> None:
        """Deletes an object, and the objects that it owns, as Kubernetes' garbage collector does."""
        raw = self._objects.get(kind, {}).pop(ref, None)
        if raw is None:
            return
        self._notify(raw, deleted=True)
        for owned in self.of(DEPLOYMENT):
            if any(owner["uid"] == raw["metadata"]["uid"] for owner in owned["metadata"].get("ownerReferences", ())):
                self.delete_object(DEPLOYMENT, ref_of(owned))

    def _store(self, raw: Raw) -> None:
        self._version += 1
        raw["metadata"]["resourceVersion"] = str(self._version)
        self._objects.setdefault(raw["kind"], {})[ref_of(raw)] = raw
        self._notify(raw, deleted=False)

    def _notify(self, raw: Raw, *, deleted: bool) -> None:
        for listener in self._listeners.get(raw["kind"], ()):
            listener(raw, deleted)

    def _change(self, kind: str, ref: ObjectRef, uid: str, change: Mapping[str, Any]) -> Raw:
        """Replaces top-level fields of one object. Raises ObjectNotFoundError."""
        raw = self._objects.get(kind, {}).get(ref)
        if raw is None or raw["metadata"]["uid"] != uid:
            raise ObjectNotFoundError(f"{kind} {ref} is gone", 404)
        after: Raw = {**raw, **change, "metadata": {**raw["metadata"]}}
        after["metadata"]["generation"] += "spec" in change
        self._store(after)
        return after

    # --- the gateway's ObjectSource and ScaleClient

    def caches(
        self, kind: Kind, parse: Callable[[Mapping[str, Any]], T | None], on_change: Callable[[], None]
    ) -> Sequence[ObjectCache[T]]:
        cache = ObjectCache(kind, parse, on_change)
        cache.replace_all({})
        cache.confirmed_s = math.inf
        self.listen(KIND_OF[kind], lambda raw, deleted: cache.drop(raw) if deleted else cache.put(raw))
        return [cache]

    async def run(self) -> None:
        """The caches are kept current by `listen`; waits until cancelled."""
        await asyncio.Event().wait()

    async def scale_up(self, ref: ObjectRef, add: int, bound: int) -> ScaleResult:
        raw = self._objects[BASE][ref]
        replicas = raw["spec"].get("replicas", 0)
        wanted = scaled_up(replicas, add, bound)
        if wanted == replicas:
            return ScaleResult.ALREADY_UP
        self._change(BASE, ref, raw["metadata"]["uid"], {"spec": {**raw["spec"], "replicas": wanted}})
        return ScaleResult.WOKEN

    # --- the operator's PlanTarget

    async def get(self, kind: str, namespace: str, name: str) -> Raw:
        raw = self._objects.get(kind, {}).get(ObjectRef(namespace, name))
        if raw is None:
            raise ObjectNotFoundError(f"{kind} {namespace}/{name} does not exist", 404)
        return raw

    async def patch_status(self, item: BaseObject | AdapterObject, status: Mapping[str, Any]) -> Raw:
        ref = ObjectRef(item.meta.namespace, item.meta.name)
        return self._change(item.key.kind.value, ref, item.meta.uid, {"status": dict(status)})

    async def patch_raw_status(self, key: Key, version: str, patch: Mapping[str, Any]) -> Raw:
        raw = await self.get(key.kind.value, key.namespace, key.name)
        status = {**raw.get("status", {}), **patch}
        return self._change(key.kind.value, ref_of(raw), raw["metadata"]["uid"], {"status": status})

    async def scale(self, base: BaseObject, replicas: int) -> None:
        ref = ObjectRef(base.meta.namespace, base.meta.name)
        raw = self._objects.get(BASE, {}).get(ref)
        if raw is None or raw["metadata"]["resourceVersion"] != base.meta.resource_version:
            raise ObjectConflictError(f"{ref} has changed", 409)
        self._change(BASE, ref, base.meta.uid, {"spec": {**raw["spec"], "replicas": replicas}})

    async def annotate_pod(self, namespace: str, name: str, annotations: Mapping[str, str]) -> None:
        """There is one process per base, so no pod is chosen among several."""

    async def apply_child(self, manifest: Mapping[str, Any]) -> Raw:
        """Keeps Deployments, which become processes, and their files. A Service or a budget has no use here."""
        if manifest["kind"] in (DEPLOYMENT, CONFIG_MAP):
            self.put(manifest)
        return dict(manifest)

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None:
        ref = ObjectRef(namespace, name)
        raw = self._objects.get(kind, {}).get(ref)
        if raw is not None and raw["metadata"]["uid"] == uid:
            self.delete_object(kind, ref)

    async def refused_pods(self, namespace: str, owner_uid: str) -> str:
        return ""

    async def post_event(self, subject: Subject, event: KubeEvent, now: float) -> None:
        self._report(event, subject)


def object_of(kind: str, ref: ObjectRef, **fields: Any) -> Raw:
    """A new object with these top-level fields; the metadata may be given in part."""
    metadata = {"namespace": ref.namespace, "name": ref.name, **fields.pop("metadata", {})}
    return {"kind": kind, "metadata": metadata, **fields}
