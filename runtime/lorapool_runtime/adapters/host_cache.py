"""Adapters in host memory, by digest: bounded in bytes, evicted least recently used first, dropped when idle.

An adapter larger than the bound is not kept. No clock, no engine.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from lorapool_runtime.engines.interface import HostAdapter


@dataclass(slots=True)
class _Kept:
    adapter: HostAdapter
    touched_s: float


class HostCache:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently touched first
        self.bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def bytes_of(self, digest: str) -> int:
        kept = self._kept.get(digest)
        return 0 if kept is None else kept.adapter.host_bytes

    def get(self, digest: str, now_s: float) -> HostAdapter | None:
        kept = self._kept.get(digest)
        if kept is None:
            return None
        self.touch(digest, now_s)
        return kept.adapter

    def touch(self, digest: str, now_s: float) -> None:
        """Marks it used now; an unknown digest is ignored."""
        kept = self._kept.get(digest)
        if kept is not None:
            kept.touched_s = now_s
            self._kept.move_to_end(digest)

    def put(self, digest: str, adapter: HostAdapter, now_s: float) -> list[str]:
        """Keeps it and returns the digests that were evicted for it (itself, when it is larger than the bound)."""
        self.drop(digest)
        if adapter.host_bytes > self._max_bytes:
            return [digest]
        self._kept[digest] = _Kept(adapter, now_s)
        self.bytes += adapter.host_bytes
        dropped = []
        while self.bytes > self._max_bytes:
            oldest = next(iter(self._kept))
            self.drop(oldest)
            dropped.append(oldest)
        return dropped

    def drop(self, digest: str) -> int:
        """Drops it and returns the bytes freed: 0 when another object, such as a slot, still references it."""
        kept = self._kept.pop(digest, None)
        if kept is None:
            return 0
        size = kept.adapter.host_bytes
        self.bytes -= size
        watch = _watch(kept.adapter)
        del kept
        return size if watch is None or watch() is None else 0

    def sweep(self, now_s: float, idle_s: float, *, keep: Collection[str]) -> list[str]:
        """Drops what was not used for `idle_s`, except `keep`, and returns the dropped digests."""
        idle = [
            digest for digest, kept in self._kept.items() if digest not in keep and now_s - kept.touched_s >= idle_s
        ]
        for digest in idle:
            self.drop(digest)
        return idle


def _watch(adapter: HostAdapter) -> weakref.ref[HostAdapter] | None:
    try:
        return weakref.ref(adapter)
    except TypeError:  # a class with slots and no room for weak references
        return None
