"""Where news of the cluster comes in: the store is updated and the keys it concerns are marked dirty.

Called by kopf's handlers, the first listing, the resync and after our own writes. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorapool_api.common import BaseCondition
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import (
    AdapterObject,
    BaseObject,
    DeploymentObject,
    Key,
    Kind,
    PodObject,
    Store,
    parse_or_none,
)


class Intake:
    def __init__(
        self,
        store: Store,
        queue: WorkQueue[Key],
        *,
        counts_interval_s: float,
        pods_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._queue = queue
        self._counts_interval_s = counts_interval_s
        self._pods_changed = pods_changed
        self.gone: dict[Key, set[str]] = {}
        """Uids of adapters seen to be deleted whose runtimes were not told yet."""

    def base(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        meta = raw["metadata"]
        key = Key(Kind.BASE, meta["namespace"], meta["name"])
        before = self._store.bases.get(key.namespace, key.name)
        after: BaseObject | None = None
        if deleted:
            if self._store.bases.drop(key.namespace, key.name, meta["uid"]) is None:
                return
        else:
            after = parse_or_none(BaseObject, raw)
            if after is None or not self._store.bases.put(after):
                return
        self._queue.add(key)
        if before is None or after is None or _as_adapters_see(before) != _as_adapters_see(after):
            for adapter in self._store.adapters_of(key):
                self._queue.add(adapter.key)

    def adapter(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        meta = raw["metadata"]
        key = Key(Kind.ADAPTER, meta["namespace"], meta["name"])
        before = self._store.adapters.get(key.namespace, key.name)
        if deleted:
            if self._store.drop_adapter(key.namespace, key.name, meta["uid"]) is None:
                return
            self.gone.setdefault(key, set()).add(meta["uid"])
        else:
            item = parse_or_none(AdapterObject, raw)
            if item is None or not self._store.put_adapter(item):
                return
            if before is not None and before.meta.uid != item.meta.uid:
                self.gone.setdefault(key, set()).add(before.meta.uid)
        self._queue.add(key)
        after = self._store.adapters.get(key.namespace, key.name)
        for item in (before, after):
            if item is not None:
                self._queue.add(item.base_key, self._counts_interval_s)
        if before is not None and before.spec.alias and (after is None or after.spec.alias != before.spec.alias):
            for rival in self._store.alias_rivals(key.namespace, before.spec.alias):
                self._queue.add(rival)

    def wrote_adapter(self, raw: Mapping[str, Any]) -> None:
        """The answer to our own status write: nothing new for the adapter, but its base counts anew."""
        item = parse_or_none(AdapterObject, raw)
        if item is not None and self._store.put_adapter(item):
            self._queue.add(item.base_key, self._counts_interval_s)

    def pod(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        item = parse_or_none(PodObject, raw)
        if item is None:
            return
        if deleted:
            changed = self._store.pods.drop(item.meta.namespace, item.meta.name, item.meta.uid) is not None
        else:
            changed = self._store.pods.put(item)
        if changed:
            self._queue.add(item.base)
            self._pods_changed()

    def deployment(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        item = parse_or_none(DeploymentObject, raw)
        if item is None:
            return
        if deleted:
            changed = self._store.deployments.drop(item.meta.namespace, item.meta.name, item.meta.uid) is not None
        else:
            changed = self._store.deployments.put(item)
        if changed:
            self._queue.add(item.base)


def _as_adapters_see(base: BaseObject) -> tuple[Any, ...]:
    """What of a base can change a plan of its adapters: not its counts, else each write would wake thousands."""
    resolved = next((item for item in base.status.conditions if item.type == BaseCondition.SOURCE_RESOLVED), None)
    told = (resolved.status, resolved.reason) if resolved is not None else None
    return base.meta.uid, base.meta.generation, base.meta.deleting, told
