"""What the API server was last heard to hold, parsed once: the operator's own caches.

Filled by the first listing, the watches and the answers to our own writes; read by `observe`. A version
older than the one held is dropped, so a late echo never takes back what a newer answer said. Plain dicts:
kopf's indexes are quadratic when thousands of objects are listed.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pydantic import ValidationError

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.common import ANNOTATION_RETRY, ANNOTATION_SPEC_HASH, LABEL_BASE, LABEL_BASE_UID
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus
from lorapool_operator.clock import unix

log = logging.getLogger(__name__)

RUNTIME_PORT_NAME = "http"


class Kind(StrEnum):
    BASE = "BaseModel"
    ADAPTER = "LoraAdapter"


class Key(NamedTuple):
    """What the work queue holds: an object by name, whichever uid it has now."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Meta:
    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created_unix_s: float
    deleting: bool
    retry: str | None
    """The retry annotation."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Meta:
        return cls(
            namespace=raw["namespace"],
            name=raw["name"],
            uid=raw["uid"],
            generation=int(raw.get("generation") or 0),
            resource_version=str(raw.get("resourceVersion") or "0"),
            created_unix_s=unix(raw.get("creationTimestamp")) or 0.0,
            deleting=raw.get("deletionTimestamp") is not None,
            retry=(raw.get("annotations") or {}).get(ANNOTATION_RETRY),
        )


@dataclass(frozen=True, slots=True)
class BaseObject:
    meta: Meta
    spec: BaseModelSpec
    status: BaseModelStatus

    @property
    def key(self) -> Key:
        return Key(Kind.BASE, self.meta.namespace, self.meta.name)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> BaseObject:
        return cls(
            Meta.parse(raw["metadata"]),
            BaseModelSpec.model_validate(raw["spec"]),
            BaseModelStatus.model_validate(raw.get("status") or {}),
        )


@dataclass(frozen=True, slots=True)
class AdapterObject:
    meta: Meta
    spec: LoraAdapterSpec
    status: LoraAdapterStatus

    @property
    def key(self) -> Key:
        return Key(Kind.ADAPTER, self.meta.namespace, self.meta.name)

    @property
    def base_key(self) -> Key:
        ref = self.spec.base_model_ref
        return Key(Kind.BASE, ref.namespace or self.meta.namespace, ref.name)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> AdapterObject:
        return cls(
            Meta.parse(raw["metadata"]),
            LoraAdapterSpec.model_validate(raw["spec"]),
            LoraAdapterStatus.model_validate(raw.get("status") or {}),
        )


@dataclass(frozen=True, slots=True)
class PodObject:
    """A runtime pod, as Kubernetes sees it."""

    meta: Meta
    base: Key
    base_uid: str
    ip: str
    port: int
    ready: bool
    terminating: bool
    problem: str
    """Why it does not run, in the kubelet's or scheduler's words; empty when nothing is wrong."""

    @property
    def gone(self) -> bool:
        return not self.ip

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> PodObject:
        meta = Meta.parse(raw["metadata"])
        labels = raw["metadata"].get("labels") or {}
        status = raw.get("status") or {}
        ended = status.get("phase") in ("Succeeded", "Failed")
        ready = any(item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions") or ())
        return cls(
            meta=meta,
            base=Key(Kind.BASE, meta.namespace, labels.get(LABEL_BASE, "")),
            base_uid=labels.get(LABEL_BASE_UID, ""),
            ip="" if ended else status.get("podIP") or "",
            port=_runtime_port(raw.get("spec") or {}),
            ready=ready and not ended and not meta.deleting,
            terminating=meta.deleting or ended,
            problem=_pod_problem(status),
        )


@dataclass(frozen=True, slots=True)
class DeploymentObject:
    meta: Meta
    base: Key
    owner_uid: str
    spec_hash: str
    problem: str

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> DeploymentObject:
        meta = Meta.parse(raw["metadata"])
        labels = raw["metadata"].get("labels") or {}
        owners = raw["metadata"].get("ownerReferences") or ()
        return cls(
            meta=meta,
            base=Key(Kind.BASE, meta.namespace, labels.get(LABEL_BASE, "")),
            owner_uid=next((item["uid"] for item in owners if item.get("kind") == Kind.BASE), ""),
            spec_hash=(raw["metadata"].get("annotations") or {}).get(ANNOTATION_SPEC_HASH, ""),
            problem=_deployment_problem(raw.get("status") or {}),
        )


def _runtime_port(spec: Mapping[str, Any]) -> int:
    """The container port named http: where the runtime of this very pod listens."""
    for container in spec.get("containers") or ():
        for port in container.get("ports") or ():
            if port.get("name") == RUNTIME_PORT_NAME:
                return int(port["containerPort"])
    return 0


def _pod_problem(status: Mapping[str, Any]) -> str:
    for container in status.get("containerStatuses") or ():
        state = container.get("state") or {}
        waiting = state.get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            ended = (container.get("lastState") or {}).get("terminated") or {}
            last = f" (last exit {ended['exitCode']} {ended.get('reason', '')})" if "exitCode" in ended else ""
            return f"{waiting['reason']}: {waiting.get('message', '')}{last}"[:300]
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {condition.get('message', '')}"[:300]
    return ""


def _deployment_problem(status: Mapping[str, Any]) -> str:
    for condition in status.get("conditions") or ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return f"{condition.get('reason', 'ReplicaFailure')}: {condition.get('message', '')}"[:300]
    return ""


class _Object(Protocol):
    @property
    def meta(self) -> Meta: ...


T = TypeVar("T", bound=_Object)
At = TypeVar("At", bound=Hashable)


@dataclass
class Cache(Generic[T]):
    """Objects of one kind by namespace and name."""

    _items: dict[tuple[str, str], T] = field(default_factory=dict)

    def get(self, namespace: str, name: str) -> T | None:
        return self._items.get((namespace, name))

    def put(self, item: T) -> bool:
        """Keeps the newer version; False when the one held is newer or the same."""
        key = (item.meta.namespace, item.meta.name)
        held = self._items.get(key)
        if held is not None and held.meta.uid == item.meta.uid and not _newer(item.meta, held.meta):
            return False
        self._items[key] = item
        return True

    def drop(self, namespace: str, name: str, uid: str | None = None) -> T | None:
        """Removes it, unless another object has the name by now."""
        held = self._items.get((namespace, name))
        if held is None or (uid is not None and held.meta.uid != uid):
            return None
        return self._items.pop((namespace, name))

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._items.values()))

    def __len__(self) -> int:
        return len(self._items)


def _newer(new: Meta, held: Meta) -> bool:
    try:
        return int(new.resource_version) > int(held.resource_version)
    except ValueError:
        return new.resource_version != held.resource_version


class Store:
    """All caches, and the two look-ups between them that would else be a walk over thousands."""

    def __init__(self) -> None:
        self.bases: Cache[BaseObject] = Cache()
        self.adapters: Cache[AdapterObject] = Cache()
        self.pods: Cache[PodObject] = Cache()
        self.deployments: Cache[DeploymentObject] = Cache()
        self._adapters_of: dict[Key, set[Key]] = {}
        self._aliases: dict[tuple[str, str], set[Key]] = {}

    def put_adapter(self, item: AdapterObject) -> bool:
        held = self.adapters.get(item.meta.namespace, item.meta.name)
        if not self.adapters.put(item):
            return False
        if held is not None:
            self._unlink(held)
        self._adapters_of.setdefault(item.base_key, set()).add(item.key)
        if item.spec.alias:
            self._aliases.setdefault((item.meta.namespace, item.spec.alias), set()).add(item.key)
        return True

    def drop_adapter(self, namespace: str, name: str, uid: str | None = None) -> AdapterObject | None:
        gone = self.adapters.drop(namespace, name, uid)
        if gone is not None:
            self._unlink(gone)
        return gone

    def adapters_of(self, base: Key) -> list[AdapterObject]:
        """The adapters that name this base, permitted or not."""
        keys = self._adapters_of.get(base, ())
        found = (self.adapters.get(key.namespace, key.name) for key in keys)
        return [item for item in found if item is not None]

    def alias_holder(self, adapter: AdapterObject) -> Key | None:
        """The older adapter of the same namespace that holds this one's alias, if any."""
        if not adapter.spec.alias:
            return None
        keys = self._aliases.get((adapter.meta.namespace, adapter.spec.alias), ())
        rivals = [item for key in keys if (item := self.adapters.get(key.namespace, key.name)) is not None]
        first = min(rivals, key=lambda item: (item.meta.created_unix_s, item.meta.name), default=adapter)
        return None if first.meta.uid == adapter.meta.uid else first.key

    def alias_rivals(self, namespace: str, alias: str) -> list[Key]:
        """Adapters that want this alias."""
        return list(self._aliases.get((namespace, alias), ()))

    def pods_of(self, base: BaseObject) -> list[PodObject]:
        """Runtime pods of this very object: a recreated base does not inherit pods."""
        return [pod for pod in self.pods if pod.base == base.key and pod.base_uid == base.meta.uid]

    def _unlink(self, item: AdapterObject) -> None:
        _discard(self._adapters_of, item.base_key, item.key)
        if item.spec.alias:
            _discard(self._aliases, (item.meta.namespace, item.spec.alias), item.key)


def _discard(index: dict[At, set[Key]], at: At, member: Key) -> None:
    members = index.get(at)
    if members is not None:
        members.discard(member)
        if not members:
            del index[at]


P = TypeVar("P", BaseObject, AdapterObject, PodObject, DeploymentObject)


def parse_or_none(kind: type[P], raw: Mapping[str, Any]) -> P | None:
    """The parsed object; None (and one log line) for one that this version cannot read."""
    try:
        return kind.parse(raw)
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        meta = raw.get("metadata") or {}
        log.warning(
            "object cannot be read",
            extra={"object": f"{meta.get('namespace')}/{meta.get('name')}", "error": str(error)},
        )
        return None
