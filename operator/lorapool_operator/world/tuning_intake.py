"""How changed FineTuneJobs and trainers' Jobs enter their cache, and which bases are planned again for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorapool_operator.world.cluster_cache import Key, ObjectKind, parse_or_none, parse_own
from lorapool_operator.world.tuning import SessionObject, TuningCache, TuningObject


class TuningIntake:
    """Updates the cache; each method takes an object as the API server sent it."""

    def __init__(
        self, cache: TuningCache, mark_dirty: Callable[[Key, float], None], *, pods_changed: Callable[[], None]
    ) -> None:
        """`mark_dirty(base, delay_s)` requests a new plan of a base's jobs; with the key of a job that this version
        cannot parse, a report of that. `pods_changed` is called when trainers may own other pods than before."""
        self._cache = cache
        self._mark_dirty = mark_dirty
        self._pods_changed = pods_changed

    def job(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        meta = raw["metadata"]
        key = Key(ObjectKind.TUNING, meta["namespace"], meta["name"])
        if deleted:
            self._cache.unreadable.pop(key, None)
            gone = self._cache.jobs.drop(meta["namespace"], meta["name"], meta["uid"])
            if gone is not None:
                self._mark_dirty(gone.base_key, 0.0)
            return
        if self._cache.jobs.known(meta):
            return
        item = parse_own(TuningObject, key, raw, self._cache.unreadable)
        if item is None:
            self._mark_dirty(key, 0.0)
        elif self._cache.jobs.put(item):
            self._mark_dirty(item.base_key, 0.0)

    def session(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None:
        item = parse_or_none(SessionObject.parse, raw)
        if item is not None and self._cache.sessions.update(item, deleted=deleted):
            self._mark_dirty(item.base, 0.0)
            self._pods_changed()

    def touched(self, key: Key, delay_s: float) -> None:
        """Requests plans that a changed base, adapter or pod of a base may affect."""
        if key.kind is ObjectKind.BASE:
            if self._cache.session_of(key) is not None or self._cache.jobs_of(key):
                self._mark_dirty(key, delay_s)
            return
        for job in self._cache.jobs:
            names = (job.spec.output.adapter_name or job.meta.name, job.spec.init_from and job.spec.init_from.name)
            if job.meta.namespace == key.namespace and key.name in names and not job.ended:
                self._mark_dirty(job.base_key, delay_s)
