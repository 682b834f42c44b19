"""Which BaseModel a runtime pod belongs to, each link by uid. Pure.

    Pod → ReplicaSet → Deployment → BaseModel
    Pod → StatefulSet → LeaderWorkerSet → BaseModel

The latter is the leader of a group of pods. A worker's StatefulSet is owned by the leader, so that no worker belongs.

Labels can be written by any user who may create pods somewhere; the owners of a pod in the base's own namespace
cannot be forged without rights in that namespace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Owned(NamedTuple):
    """An object and its controller, by uid. The owner is empty if there is none of the expected kind."""

    namespace: str
    uid: str
    owner_uid: str

    @classmethod
    def parse(cls, metadata: Mapping[str, Any], *owner_kinds: str) -> Owned:
        """Parses an object's metadata. Raises KeyError."""
        return cls(str(metadata["namespace"]), str(metadata["uid"]), controller_uid(metadata, *owner_kinds))


def controller_uid(metadata: Mapping[str, Any], *kinds: str) -> str:
    """Returns the uid of the object's controller if that is of one of these kinds, else an empty text."""
    owners = metadata.get("ownerReferences") or ()
    return next((str(item["uid"]) for item in owners if item.get("controller") and item.get("kind") in kinds), "")


POD_OWNERS = ("ReplicaSet", "StatefulSet")
"""The kinds that own runtime pods."""


@dataclass(frozen=True, slots=True)
class Owners:
    """The owners of what owns pods, by namespace and uid: an owner is in its object's namespace."""

    sets: Mapping[tuple[str, str], str]
    """Of ReplicaSets and StatefulSets."""
    workloads: Mapping[tuple[str, str], str]
    """Of Deployments and LeaderWorkerSets."""

    @classmethod
    def of(cls, sets: Iterable[Owned], workloads: Iterable[Owned]) -> Owners:
        return cls(_owners(sets), _owners(workloads))

    def base_uid(self, pod: Owned) -> str:
        """Returns the uid of the BaseModel that the pod belongs to; empty if it belongs to none."""
        return self.workloads.get((pod.namespace, self.workload_uid(pod)), "")

    def workload_uid(self, pod: Owned) -> str:
        """Returns the uid of what made the pod's set: of a worker of a group, that is its leader's pod."""
        return self.sets.get((pod.namespace, pod.owner_uid), "")


def _owners(items: Iterable[Owned]) -> dict[tuple[str, str], str]:
    return {(item.namespace, item.uid): item.owner_uid for item in items}
