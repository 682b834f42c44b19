"""How a changed API object enters the caches, and which keys are marked dirty for it.

Watches, listings and the responses to the operator's own writes all pass through here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lorapool_operator.world.cluster_cache import (
    AdapterObject,
    BaseObject,
    ClusterCache,
    Key,
    KindCache,
    ObjectKind,
    PodObject,
    ReplicaSetObject,
    StatefulSetObject,
    WorkloadObject,
    names_of,
    parse_or_none,
    parse_own,
)

Own = TypeVar("Own", BaseObject, AdapterObject)
Owner = TypeVar("Owner", ReplicaSetObject, StatefulSetObject, WorkloadObject)


class Intake:
    """Updates the caches; each method takes an object as the API server sent it."""

    def __init__(
        self,
        cache: ClusterCache,
        mark_dirty: Callable[[Key, float], None],
        *,
        counts_interval_s: float,
        pods_changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`mark_dirty(key, delay_s)` requests a new plan.

        `pods_changed` is called after any change of a pod, or of what pods belong to.
        """
        self._cache = cache
        self._mark_dirty = mark_dirty
        self._counts_interval_s = counts_interval_s
        self._pods_changed = pods_changed
        self._deleted_adapters: dict[Key, set[str]] = {}

    def deleted_adapters(self, key: Key) -> tuple[str, ...]:
        """Returns the uids of deleted adapters of this name that may still be registered with runtimes."""
        return tuple(sorted(self._deleted_adapters.get(key, ())))

    def forget_deleted(self, key: Key, uid: str) -> None:
        """Records that no runtime has this deleted adapter any more."""
        uids = self._deleted_adapters.get(key, set())
        uids.discard(uid)
        if not uids:
            self._deleted_adapters.pop(key, None)

    def base(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        meta = raw["metadata"]
        key = Key(ObjectKind.BASE, meta["namespace"], meta["name"])
        before = self._cache.bases.get(key.namespace, key.name)
        after: BaseObject | None = None
        if deleted:
            self._cache.unreadable.pop(key, None)
            if self._cache.bases.drop(key.namespace, key.name, meta["uid"]) is None:
                return
        elif self._cache.bases.known(meta):
            return
        else:
            after = self._parse(BaseObject, key, raw)
            if after is None or not self._cache.bases.put(after):
                return
        self._mark_dirty(key, 0.0)
        if before is None or after is None or before.meta.uid != after.meta.uid:
            self._pods_changed()
        self._names_released(before, after)
        if before is None or after is None or _adapters_depend_on(before) != _adapters_depend_on(after):
            for adapter in self._cache.adapters_of(key):
                self._mark_dirty(adapter.key, 0.0)

    def adapter(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        meta = raw["metadata"]
        key = Key(ObjectKind.ADAPTER, meta["namespace"], meta["name"])
        before = self._cache.adapters.get(key.namespace, key.name)
        if deleted:
            self._cache.unreadable.pop(key, None)
            if self._cache.drop_adapter(key.namespace, key.name, meta["uid"]) is None:
                return
            self._deleted_adapters.setdefault(key, set()).add(meta["uid"])
        elif self._cache.adapters.known(meta):
            return
        else:
            item = self._parse(AdapterObject, key, raw)
            if item is None or not self._cache.put_adapter(item):
                return
            if before is not None and before.meta.uid != item.meta.uid:
                self._deleted_adapters.setdefault(key, set()).add(before.meta.uid)
        self._mark_dirty(key, 0.0)
        after = self._cache.adapters.get(key.namespace, key.name)
        for item in (before, after):
            if item is not None:
                self._mark_dirty(item.base_key, self._counts_interval_s)
        self._names_released(before, after)

    def _names_released(
        self, before: BaseObject | AdapterObject | None, after: BaseObject | AdapterObject | None
    ) -> None:
        """Has the objects planned again that claim a name which this object had until now."""
        if before is None:
            return
        for name in names_of(before) - (names_of(after) if after is not None else set()):
            for claimant in self._cache.claimants(before.names_in, name):
                self._mark_dirty(claimant, 0.0)

    def wrote_base(self, raw: Mapping[str, Any]) -> None:
        """Takes the response to the operator's own status write."""
        item = parse_or_none(BaseObject.parse, raw)
        if item is not None:
            self._cache.bases.put(item)

    def _parse(self, kind: type[Own], key: Key, raw: Mapping[str, Any]) -> Own | None:
        """Parses one of Lorapool's own objects; one that this version cannot parse gets a condition that says so."""
        item = parse_own(kind, key, raw, self._cache.unreadable)
        if item is None:
            self._mark_dirty(key, 0.0)
        return item

    def wrote_adapter(self, raw: Mapping[str, Any]) -> None:
        """Takes the response to the operator's own status write: only the base's counts of adapters may change."""
        item = parse_or_none(AdapterObject.parse, raw)
        if item is not None and self._cache.put_adapter(item):
            self._mark_dirty(item.base_key, self._counts_interval_s)

    def pod(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        item = parse_or_none(PodObject.parse, raw)
        if item is not None and self._cache.pods.update(item, deleted=deleted):
            self._mark_dirty(item.base, 0.0)
            self._pods_changed()

    def replica_set(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        item = parse_or_none(ReplicaSetObject.parse, raw)
        if item is not None:
            self._owner(self._cache.replica_sets, item, item.base, deleted)

    def stateful_set(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        item = parse_or_none(StatefulSetObject.parse, raw)
        if item is None:
            return
        groups = self._cache.leader_worker_sets.get(item.meta.namespace, item.set_name)
        if groups is not None and deleted and groups.meta.uid == item.owner_uid:
            # Without a watch of LeaderWorkerSets this shows that one was deleted; else it is applied unchanged.
            self._cache.leader_worker_sets.drop(groups.meta.namespace, groups.meta.name)
        before = self._cache.stateful_sets.get(item.meta.namespace, item.meta.name)
        self._owner(self._cache.stateful_sets, item, groups.base if groups is not None else None, deleted)
        if groups is not None and before is not None and before.lacks_pods != item.lacks_pods:
            self._mark_dirty(groups.base, 0.0)

    def deployment(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        self._workload(self._cache.deployments, parse_or_none(WorkloadObject.parse, raw), deleted)

    def leader_worker_set(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        self._workload(self._cache.leader_worker_sets, parse_or_none(WorkloadObject.parse_groups, raw), deleted)

    def _workload(self, cache: KindCache[WorkloadObject], item: WorkloadObject | None, deleted: bool) -> None:
        if item is not None and self._owner(cache, item, item.base, deleted):
            self._mark_dirty(item.base, 0.0)

    def _owner(self, cache: KindCache[Owner], item: Owner, base: Key | None, deleted: bool) -> bool:
        """Updates the cache of a kind that owns pods, and who owns which pod. Returns False if nothing changed."""
        before = cache.get(item.meta.namespace, item.meta.name)
        changed = cache.update(item, deleted=deleted)
        if changed and (deleted or before is None or _link(before) != _link(item)):
            if base is not None:
                self._mark_dirty(base, 0.0)
            self._pods_changed()
        return changed


def _link(item: ReplicaSetObject | StatefulSetObject | WorkloadObject) -> tuple[str, str]:
    return item.meta.uid, item.owner_uid


def _adapters_depend_on(base: BaseObject) -> tuple[Any, ...]:
    """Returns the part of a base that its adapters' plans depend on.

    Its counts and its number of replicas, which change often, are no part.
    """
    spec, failure = base.spec.model_copy(update={"replicas": None}), base.failure
    failed = failure.reason if failure is not None else None
    return base.meta.uid, spec, base.meta.deleting, failed, base.stalled, base.status.modules is None
