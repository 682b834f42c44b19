"""Which BaseModel a runtime pod belongs to: Pod → ReplicaSet → Deployment → BaseModel, each link by uid. Pure.

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
    def parse(cls, metadata: Mapping[str, Any], owner_kind: str) -> Owned:
        """Parses an object's metadata. Raises KeyError."""
        return cls(str(metadata["namespace"]), str(metadata["uid"]), controller_uid(metadata, owner_kind))


def controller_uid(metadata: Mapping[str, Any], kind: str) -> str:
    """Returns the uid of the object's controller if that is of this kind, else an empty text."""
    owners = metadata.get("ownerReferences") or ()
    return next((str(item["uid"]) for item in owners if item.get("controller") and item.get("kind") == kind), "")


@dataclass(frozen=True, slots=True)
class Owners:
    """The owners of ReplicaSets and of Deployments, by namespace and uid: an owner is in its object's namespace."""

    replica_sets: Mapping[tuple[str, str], str]
    deployments: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, replica_sets: Iterable[Owned], deployments: Iterable[Owned]) -> Owners:
        return cls(_owners(replica_sets), _owners(deployments))

    def base_uid(self, pod: Owned) -> str:
        """Returns the uid of the BaseModel that the pod belongs to; empty if it belongs to none."""
        deployment = self.replica_sets.get((pod.namespace, pod.owner_uid), "")
        return self.deployments.get((pod.namespace, deployment), "")


def _owners(items: Iterable[Owned]) -> dict[tuple[str, str], str]:
    return {(item.namespace, item.uid): item.owner_uid for item in items}
