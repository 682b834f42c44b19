"""The seam to whatever stores the objects: the API server in a cluster, a folder of YAML files for `make serve`.

A source fills caches of parsed objects and keeps them current; it also scales a base up. Pure: the two
implementations are `watch` with `kube`, and `lorapool_serve`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from lorapool_gateway.routing.objects import ObjectRef

log = logging.getLogger(__name__)

T = TypeVar("T")


class Kind(StrEnum):
    """The kinds of objects that the gateway reads, by their plural name."""

    BASES = "basemodels"
    ADAPTERS = "loraadapters"
    PODS = "pods"
    REPLICA_SETS = "replicasets"
    DEPLOYMENTS = "deployments"
    STATEFUL_SETS = "statefulsets"
    LEADER_WORKER_SETS = "leaderworkersets"
    """A cluster need not have this kind."""
    API_KEYS = "secrets"
    JOBS = "finetunejobs"
    """Only read where the release has a store."""


class ObjectCache(Generic[T]):
    """Parsed objects of one kind. An object that cannot be parsed counts as absent: denied, not guessed."""

    def __init__(
        self, kind: Kind, parse: Callable[[Mapping[str, Any]], T | None], on_change: Callable[[], None]
    ) -> None:
        """`parse` returns None for an object without use; it counts as absent too.

        `on_change` is called after a change of a parsed value, not after every write to an object.
        """
        self.kind = kind
        self._parse = parse
        self._on_change = on_change
        self.objects: dict[ObjectRef, T] = {}
        self.synced = False
        """True once all objects were read. Stays True when the source is lost: an old table is better than none."""
        self.confirmed_s = -math.inf
        """When the source last said that these are its objects, in monotonic time."""

    def parse_all(self, raws: Iterable[Mapping[str, Any]]) -> dict[ObjectRef, T]:
        """Parses without changing the cache, so that a long list can be read in parts."""
        return {ref_of(raw): parsed for raw in raws if (parsed := self._parsed(raw)) is not None}

    def replace_all(self, objects: dict[ObjectRef, T]) -> None:
        """Makes these the only objects of the cache."""
        first, self.synced = not self.synced, True
        if first or objects != self.objects:
            self.objects = objects
            self._on_change()

    def put(self, raw: Mapping[str, Any]) -> None:
        """Adds or replaces one object."""
        ref, parsed = ref_of(raw), self._parsed(raw)
        if parsed == self.objects.get(ref):
            return
        if parsed is None:
            del self.objects[ref]
        else:
            self.objects[ref] = parsed
        self._on_change()

    def drop(self, raw: Mapping[str, Any]) -> None:
        """Removes one object."""
        if self.objects.pop(ref_of(raw), None) is not None:
            self._on_change()

    def _parsed(self, raw: Mapping[str, Any]) -> T | None:
        try:
            return self._parse(raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # The text of an error about a Secret may contain a part of the Secret.
            detail = type(error).__name__ if self.kind is Kind.API_KEYS else repr(error)[:300]
            log.warning("object ignored", extra={"kind": self.kind, "object": str(ref_of(raw)), "error": detail})
            return None


class ObjectSource(Protocol):
    def caches(
        self, kind: Kind, parse: Callable[[Mapping[str, Any]], T | None], on_change: Callable[[], None]
    ) -> Sequence[ObjectCache[T]]:
        """Empty caches that together will contain all objects of the kind; `run` fills them."""

    async def run(self) -> None:
        """Keeps all caches current until cancelled."""


class ScaleResult(StrEnum):
    WOKEN = "woken"
    ALREADY_UP = "already_up"
    CONFLICT = "conflict"


class ScaleClient(Protocol):
    async def scale_up(self, ref: ObjectRef, add: int, bound: int) -> ScaleResult:
        """Adds `add` replicas up to `bound`, and at least one to a base that has none.

        ALREADY_UP if that changes nothing, CONFLICT when another writer was faster. Raises on failure.
        """


def scaled_up(replicas: int, add: int, bound: int) -> int:
    """Returns the number of replicas to write; never less than `replicas`, and at least 1."""
    return max(1, replicas, min(replicas + add, bound))


def ref_of(raw: Mapping[str, Any]) -> ObjectRef:
    metadata = raw.get("metadata") or {}
    return ObjectRef(str(metadata.get("namespace", "")), str(metadata.get("name", "")))
