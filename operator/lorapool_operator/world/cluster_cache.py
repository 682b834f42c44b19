"""The operator's caches of API objects, each parsed once.

The first listing, the watches and the responses to the operator's own writes fill them. A version older than the
cached one is dropped, so that a late watch event never overwrites a newer response. A deleted object never returns: a
response that arrives after its deletion is dropped, since a uid is never used again. They are plain dicts, since kopf's
indexes take quadratic time to list thousands of objects.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from pydantic import BaseModel as PydanticModel
from pydantic import ValidationError

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.common import (
    ANNOTATION_DELETION_COST,
    ANNOTATION_RETRY,
    ANNOTATION_TEMPLATE_HASH,
    LABEL_BASE,
    LABEL_BASE_UID,
    LABEL_GROUP_INDEX,
    LABEL_GROUP_SET,
    BaseCondition,
    Condition,
    Reason,
)
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus
from lorapool_api.pod_address import PLAIN, runtime_port
from lorapool_api.trust.ownership import POD_OWNERS, Owned, Owners, controller_uid
from lorapool_operator.clock import unix
from lorapool_operator.world import problems
from lorapool_operator.world.compact import compact_adapter, share_conditions

log = logging.getLogger(__name__)

DELETED_UIDS = 10_000
"""Remembered deletions of each kind: far more than responses are under way at a time."""


class ObjectKind(StrEnum):
    """Lorapool's own kinds."""

    BASE = "BaseModel"
    ADAPTER = "LoraAdapter"
    TUNING = "FineTuneJob"

    __hash__ = str.__hash__  # the enum's own is a Python function, and every look-up by a key calls it


class Key(NamedTuple):
    """An object by its name, whatever its uid is now."""

    kind: ObjectKind
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
    """Value of the retry annotation."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Meta:
        return cls(
            namespace=sys.intern(raw["namespace"]),
            name=raw["name"],
            uid=sys.intern(raw["uid"]),
            generation=int(raw.get("generation") or 0),
            resource_version=str(raw.get("resourceVersion") or "0"),
            created_unix_s=unix(raw.get("creationTimestamp")) or 0.0,
            deleting=raw.get("deletionTimestamp") is not None,
            retry=(raw.get("annotations") or {}).get(ANNOTATION_RETRY),
        )


def uid_hash(uid: str) -> str:
    """Returns a hash that identifies an object in the status of another, whose readers need not know the uid."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16]


class UnreadableError(ValueError):
    """A part of an object that this version cannot parse. The message names the fields, without their values."""


Part = TypeVar("Part", bound=PydanticModel)


def parse_part(model: type[Part], raw: Mapping[str, Any], name: str) -> Part:
    """Parses spec or status. Raises UnreadableError, or KeyError if there is no spec."""
    try:
        return model.model_validate(raw[name] if name == "spec" else raw.get(name) or {})
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False, include_context=False)
        fields = (".".join(map(str, (name, *item["loc"]))) for item in items)
        problems = (f"{field}: {item['msg']}" for field, item in zip(fields, items, strict=True))
        raise UnreadableError("; ".join(list(problems)[:3])) from error


@dataclass(frozen=True, slots=True)
class BaseObject:
    meta: Meta
    spec: BaseModelSpec
    status: BaseModelStatus

    @property
    def key(self) -> Key:
        return Key(ObjectKind.BASE, self.meta.namespace, self.meta.name)

    @property
    def names_in(self) -> str:
        """The namespace in which its model names are unique."""
        return self.meta.namespace

    @property
    def extra_name(self) -> str | None:
        return self.spec.served_name

    @property
    def granted_name(self) -> str | None:
        """The additional name that the status says it has."""
        return self.status.served_name

    def admits(self, namespace: str) -> bool:
        """True for its own namespace and those that its owner lists."""
        return namespace == self.meta.namespace or namespace in self.spec.access.namespaces

    @property
    def failure(self) -> Condition | None:
        """The condition that says why no request would be answered; None while one may be, after a start."""
        ready = find_condition(self.status.conditions, BaseCondition.READY)
        waits = ready is None or ready.status != "False" or ready.reason == Reason.STARTING
        return None if waits else ready

    @property
    def stalled(self) -> bool:
        """True if nothing about the base changes until a person, or a request, acts."""
        return find_condition(self.status.conditions, BaseCondition.STALLED) is not None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> BaseObject:
        """Parses the API server's JSON. Raises UnreadableError or KeyError."""
        return cls(
            Meta.parse(raw["metadata"]),
            parse_part(BaseModelSpec, raw, "spec"),
            parse_part(BaseModelStatus, raw, "status"),
        )


@dataclass(frozen=True, slots=True)
class AdapterObject:
    meta: Meta
    spec: LoraAdapterSpec
    status: LoraAdapterStatus

    @property
    def key(self) -> Key:
        return Key(ObjectKind.ADAPTER, self.meta.namespace, self.meta.name)

    @property
    def base_key(self) -> Key:
        ref = self.spec.base_model_ref
        return Key(ObjectKind.BASE, ref.namespace or self.meta.namespace, ref.name)

    @property
    def names_in(self) -> str:
        """The namespace of its base, whose owner's models have unique names."""
        return self.base_key.namespace

    @property
    def extra_name(self) -> str | None:
        return self.spec.alias

    @property
    def granted_name(self) -> str | None:
        """The additional name that the status says it has."""
        return self.status.alias

    @property
    def recorded_fingerprint(self) -> str | None:
        """The fingerprint of the last final inspection result, as the status records it.

        Older versions recorded the base's uid, which contains hyphens, in place of its hash.
        """
        base, slash, inputs = (self.status.judged or "").partition("/")
        return f"{uid_hash(base)}/{inputs}" if slash and "-" in base else self.status.judged

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> AdapterObject:
        """Parses the API server's JSON. Raises UnreadableError or KeyError."""
        status = dict(raw.get("status") or {})
        status["conditions"] = share_conditions(status.get("conditions") or [])
        item = cls(
            Meta.parse(raw["metadata"]),
            parse_part(LoraAdapterSpec, raw, "spec"),
            parse_part(LoraAdapterStatus, {"status": status}, "status"),
        )
        compact_adapter(item.spec, item.status)
        return item


@dataclass(frozen=True, slots=True)
class UnreadableObject:
    """An object that this version cannot parse, as the API server sent it."""

    raw: Mapping[str, Any]
    error: str


@dataclass(frozen=True, slots=True)
class PodObject:
    """A runtime pod in Kubernetes."""

    meta: Meta
    base: Key
    base_uid: str
    """Uid of the BaseModel that its label names; `ClusterCache.runtime_pods` are those that belong to it."""
    ip: str
    port: int
    ready: bool
    terminating: bool
    problem: str
    """Why it does not run, in the words of the kubelet or the scheduler; empty if nothing is wrong."""
    template_hash: str = ""
    """Hash of the template that it was made from; empty for a pod of an older version."""
    deletion_cost: str = ""
    """Value of the annotation by which Kubernetes chooses the pods to be stopped."""
    ended_unix_s: float = 0.0
    """When a pod that will not run again ended; 0 for any other."""
    restarts: int = 0
    """How often its process was started again."""
    last_exit: str = ""
    """How its process ended before the last restart."""
    last_exit_unix_s: float = 0.0
    last_crash: str = ""
    """The same as a problem, if its process failed; empty if it did not."""
    owner_uid: str = ""
    """Uid of the ReplicaSet or StatefulSet that controls it."""
    group: int | None = None
    """Number of its group; None for a pod of a Deployment."""
    job_uid: str = ""
    """Uid of the batch/v1 Job that controls it, for the pod of a trainer."""
    disruption: str = ""
    """Why Kubernetes ends it, such as PreemptionByScheduler; empty while it does not."""
    scheme: str = PLAIN
    """How its runtime is spoken to: http or https."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> PodObject:
        meta = Meta.parse(raw["metadata"])
        labels = raw["metadata"].get("labels") or {}
        annotations = raw["metadata"].get("annotations") or {}
        status = raw.get("status") or {}
        ended = status.get("phase") in ("Succeeded", "Failed")
        scheme, port = runtime_port(raw.get("spec") or {})
        restarts, last, last_at = problems.last_exit(status)
        ready = any(item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions") or ())
        return cls(
            meta=meta,
            base=Key(ObjectKind.BASE, meta.namespace, labels.get(LABEL_BASE, "")),
            base_uid=labels.get(LABEL_BASE_UID, ""),
            ip="" if ended else status.get("podIP") or "",
            port=port,
            ready=ready and not ended and not meta.deleting,
            terminating=meta.deleting or ended,
            problem=problems.pod_problem(status),
            template_hash=annotations.get(ANNOTATION_TEMPLATE_HASH, ""),
            deletion_cost=annotations.get(ANNOTATION_DELETION_COST, ""),
            ended_unix_s=(unix(problems.ended_at(status)) or 0.0) if ended else 0.0,
            restarts=restarts,
            last_exit=last,
            last_exit_unix_s=unix(last_at) or 0.0,
            last_crash=problems.last_crash(status),
            owner_uid=controller_uid(raw["metadata"], *POD_OWNERS),
            group=int(labels[LABEL_GROUP_INDEX]) if LABEL_GROUP_INDEX in labels else None,
            job_uid=controller_uid(raw["metadata"], "Job"),
            disruption=problems.disruption(status),
            scheme=scheme,
        )


@dataclass(frozen=True, slots=True)
class ReplicaSetObject:
    """The link between a Deployment and its pods."""

    meta: Meta
    base: Key
    owner_uid: str
    """Uid of the Deployment that controls it."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> ReplicaSetObject:
        meta = Meta.parse(raw["metadata"])
        base = (raw["metadata"].get("labels") or {}).get(LABEL_BASE, "")
        return cls(meta, Key(ObjectKind.BASE, meta.namespace, base), controller_uid(raw["metadata"], "Deployment"))


@dataclass(frozen=True, slots=True)
class StatefulSetObject:
    """The link between a LeaderWorkerSet and the leaders of its groups, or between a leader and its workers."""

    meta: Meta
    set_name: str
    """Name of the LeaderWorkerSet."""
    owner_uid: str
    """Uid of the LeaderWorkerSet, or of the leader's pod."""
    lacks_pods: bool = False
    """Fewer pods exist than it is to make."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> StatefulSetObject:
        metadata, status = raw["metadata"], raw.get("status") or {}
        name = (metadata.get("labels") or {}).get(LABEL_GROUP_SET, "")
        wanted = (raw.get("spec") or {}).get("replicas", 1)
        lacks = bool(status.get("observedGeneration")) and int(status.get("replicas") or 0) < int(wanted)
        return cls(Meta.parse(metadata), name, controller_uid(metadata, LEADER_WORKER_SET, "Pod"), lacks)


DEPLOYMENT, LEADER_WORKER_SET = "Deployment", "LeaderWorkerSet"
HELD_BACK = 1000
"""Number of the first group that a LeaderWorkerSet may replace while its rollout is paused: above every group's."""


@dataclass(frozen=True, slots=True)
class WorkloadObject:
    """What makes the runtime pods of a base: a Deployment, or a LeaderWorkerSet, whose replicas are groups of pods."""

    meta: Meta
    base: Key
    owner_uid: str
    """Uid of the BaseModel that owns it; empty for none."""
    problem: str
    """Why it cannot create pods; empty if nothing is wrong."""
    template_hash: str = ""
    """Hash of its template."""
    paused: bool = False
    """Its pods are not replaced when the template changes."""
    rolling: bool = False
    """Its pods are being replaced, and progress is still expected."""
    kind: str = DEPLOYMENT

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> WorkloadObject:
        """Parses a Deployment."""
        spec, status = raw.get("spec") or {}, raw.get("status") or {}
        return cls(
            *_owned_by_base(raw),
            problem=problems.deployment_problem(status),
            template_hash=_template_hash(spec.get("template") or {}),
            paused=bool(spec.get("paused")),
            rolling=not spec.get("paused") and _progress(status) not in SETTLED,
        )

    @classmethod
    def parse_groups(cls, raw: Mapping[str, Any]) -> WorkloadObject:
        """Parses a LeaderWorkerSet. It does not report why pods cannot be created."""
        spec, status = raw.get("spec") or {}, raw.get("status") or {}
        rollout = (spec.get("rolloutStrategy") or {}).get("rollingUpdateConfiguration") or {}
        paused = int(rollout.get("partition") or 0) >= HELD_BACK
        updates = (item for item in status.get("conditions") or () if item["type"] == "UpdateInProgress")
        return cls(
            *_owned_by_base(raw),
            problem="",
            template_hash=_template_hash((spec.get("leaderWorkerTemplate") or {}).get("leaderTemplate") or {}),
            paused=paused,
            rolling=not paused and any(item["status"] == "True" for item in updates),
            kind=LEADER_WORKER_SET,
        )


def _owned_by_base(raw: Mapping[str, Any]) -> tuple[Meta, Key, str]:
    meta = Meta.parse(raw["metadata"])
    base = (raw["metadata"].get("labels") or {}).get(LABEL_BASE, "")
    return meta, Key(ObjectKind.BASE, meta.namespace, base), controller_uid(raw["metadata"], ObjectKind.BASE)


SETTLED = ("", "NewReplicaSetAvailable", "ProgressDeadlineExceeded")
"""Reasons of a Deployment's condition Progressing without a rollout that may still succeed."""


def _progress(status: Mapping[str, Any]) -> str:
    progressing = (item for item in status.get("conditions") or () if item["type"] == "Progressing")
    return str(next((item.get("reason") for item in progressing), "") or "")


def _template_hash(template: Mapping[str, Any]) -> str:
    annotations = (template.get("metadata") or {}).get("annotations") or {}
    return str(annotations.get(ANNOTATION_TEMPLATE_HASH, ""))


def find_condition(conditions: Iterable[Condition], kind: str) -> Condition | None:
    """Returns the condition of this type, or None."""
    return next((item for item in conditions if item.type == kind), None)


class _Object(Protocol):
    @property
    def meta(self) -> Meta: ...


T = TypeVar("T", bound=_Object)
At = TypeVar("At", bound=Hashable)


@dataclass
class KindCache(Generic[T]):
    """The objects of one kind by namespace and name."""

    _items: dict[tuple[str, str], T] = field(default_factory=dict)
    _deleted: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Uids of the objects that were deleted last."""

    def get(self, namespace: str, name: str) -> T | None:
        return self._items.get((namespace, name))

    def known(self, meta: Mapping[str, Any]) -> bool:
        """True if this very version of the object is cached, so that it need not be parsed again."""
        held = self._items.get((meta["namespace"], meta["name"]))
        return (
            held is not None
            and held.meta.uid == meta["uid"]
            and held.meta.resource_version == str(meta.get("resourceVersion"))
        )

    def put(self, item: T) -> bool:
        """Stores the object. Returns False, and changes nothing, if it was deleted or is not newer than the cached."""
        if item.meta.uid in self._deleted:
            return False
        key = (item.meta.namespace, item.meta.name)
        held = self._items.get(key)
        if held is not None and held.meta.uid == item.meta.uid and not _newer(item.meta, held.meta):
            return False
        self._items[key] = item
        return True

    def drop(self, namespace: str, name: str, uid: str | None = None) -> T | None:
        """Removes and returns the object, unless the name belongs to another object (`uid`) by now."""
        if uid is not None:
            self._deleted[uid] = None
            if len(self._deleted) > DELETED_UIDS:
                self._deleted.popitem(last=False)
        held = self._items.get((namespace, name))
        if held is None or (uid is not None and held.meta.uid != uid):
            return None
        return self._items.pop((namespace, name))

    def update(self, item: T, *, deleted: bool) -> bool:
        """Stores or removes the object. Returns False if nothing changed."""
        if deleted:
            return self.drop(item.meta.namespace, item.meta.name, item.meta.uid) is not None
        return self.put(item)

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._items.values()))

    def __len__(self) -> int:
        return len(self._items)


def _newer(new: Meta, held: Meta) -> bool:
    try:
        return int(new.resource_version) > int(held.resource_version)
    except ValueError:
        return new.resource_version != held.resource_version


class ClusterCache:
    """All caches, with the indexes that save a scan over thousands of adapters."""

    def __init__(self) -> None:
        self.bases: KindCache[BaseObject] = KindCache()
        self.adapters: KindCache[AdapterObject] = KindCache()
        self.pods: KindCache[PodObject] = KindCache()
        self.replica_sets: KindCache[ReplicaSetObject] = KindCache()
        self.deployments: KindCache[WorkloadObject] = KindCache()
        self.stateful_sets: KindCache[StatefulSetObject] = KindCache()
        self.leader_worker_sets: KindCache[WorkloadObject] = KindCache()
        self.unlisted: set[str | None] = set()
        """Watched namespaces that were never listed (None: the cluster): an object missing there may exist."""
        self.unreadable: dict[Key, UnreadableObject] = {}
        """Objects whose newest version cannot be parsed; the last one that could be stays in the caches above."""
        self._adapters_of: dict[Key, dict[Key, AdapterObject]] = {}
        self._by_uid: dict[str, AdapterObject] = {}
        self._names: dict[tuple[str, str], set[Key]] = {}
        """Adapters by the namespace of their base and each of their two names."""

    def put_adapter(self, item: AdapterObject) -> bool:
        """Stores an adapter and updates the indexes. Returns False if the cached version is newer or the same."""
        held = self.adapters.get(item.meta.namespace, item.meta.name)
        if not self.adapters.put(item):
            return False
        if held is not None:
            self._unlink(held)
        self._adapters_of.setdefault(item.base_key, {})[item.key] = item
        self._by_uid[item.meta.uid] = item
        for name in names_of(item):
            self._names.setdefault((item.names_in, name), set()).add(item.key)
        return True

    def drop_adapter(self, namespace: str, name: str, uid: str | None = None) -> AdapterObject | None:
        """Removes an adapter, also from the indexes, unless the name belongs to another object (`uid`) by now."""
        gone = self.adapters.drop(namespace, name, uid)
        if gone is not None:
            self._unlink(gone)
        return gone

    def may_exist(self, key: Key) -> bool:
        """True for an object that is missing in the caches only because its namespace was never listed."""
        return key.namespace in self.unlisted

    def adapters_of(self, base: Key) -> list[AdapterObject]:
        """Returns the adapters that name this base, permitted or not."""
        return list(self._adapters_of.get(base, {}).values())

    def adapter_of(self, uid: str) -> AdapterObject | None:
        """Returns the adapter with this uid."""
        return self._by_uid.get(uid)

    def name_holder(self, item: BaseObject | AdapterObject) -> Key | None:
        """Returns the object that has this one's additional model name, or None if that is this one.

        A name is unique among the bases of a namespace and the adapters, of any namespace, that they admit. First come,
        first served: an object keeps the name that its status shows. A name that none has so far goes to an object that
        is called so, or else to the oldest that claims it.
        """
        name = item.extra_name
        if not name:
            return None
        first = min((item, *self._named(item.names_in, name)), key=lambda other: _claim(other, name))
        return None if first.meta.uid == item.meta.uid else first.key

    def _named(self, namespace: str, name: str) -> list[BaseObject | AdapterObject]:
        found: list[BaseObject | AdapterObject] = [
            base for base in self.bases if base.meta.namespace == namespace and name in names_of(base)
        ]
        for key in self._names.get((namespace, name), ()):
            adapter = self.adapters.get(key.namespace, key.name)
            base = self.bases.get(namespace, adapter.base_key.name) if adapter is not None else None
            if adapter is not None and base is not None and base.admits(key.namespace):
                found.append(adapter)
        return found

    def claimants(self, namespace: str, name: str) -> list[Key]:
        """Returns the objects whose spec claims this additional name among the models of a namespace."""
        return [item.key for item in self._named(namespace, name) if item.extra_name == name]

    def pods_of(self, base: BaseObject) -> list[PodObject]:
        """Returns the runtime pods of this very object: a recreated base does not inherit pods."""
        return [pod for pod in self.runtime_pods() if pod.base == base.key]

    def runtime_pods(self) -> list[PodObject]:
        """Returns the pods whose labels and owners name the same BaseModel, of their own namespace, that exists.

        Any other pod with the labels of a runtime is no runtime: it is neither polled nor counted.
        """
        owners = self._owners()
        return [pod for pod in self.pods if self._belongs(pod, owners)]

    def workers_of(self, base: BaseObject) -> list[PodObject]:
        """Returns the pods of the base's groups that are not leaders: no request and no poll is sent to them."""
        owners = self._owners()
        leaders = {pod.meta.uid for pod in self.pods_of(base) if pod.group is not None}
        return [pod for pod in self.pods if leaders and owners.workload_uid(_owned(pod)) in leaders]

    def short_sets_of(self, base: BaseObject, name: str) -> list[str]:
        """Returns the uids of the StatefulSets of the base's groups that lack pods. `name`: of the LeaderWorkerSet."""
        groups = self.leader_worker_sets.get(base.meta.namespace, name)
        if groups is None or groups.owner_uid != base.meta.uid:
            return []
        owners = {groups.meta.uid, *(pod.meta.uid for pod in self.pods_of(base))}
        return sorted(item.meta.uid for item in self.stateful_sets if item.lacks_pods and item.owner_uid in owners)

    def workloads(self) -> Iterator[WorkloadObject]:
        """Yields what makes the runtime pods of all bases."""
        yield from self.deployments
        yield from self.leader_worker_sets

    def _owners(self) -> Owners:
        sets = (*map(_owned, self.replica_sets), *map(_owned, self.stateful_sets))
        return Owners.of(sets, map(_owned, self.workloads()))

    def _belongs(self, pod: PodObject, owners: Owners) -> bool:
        base = self.bases.get(pod.base.namespace, pod.base.name)
        return base is not None and pod.base_uid == base.meta.uid == owners.base_uid(_owned(pod))

    def _unlink(self, item: AdapterObject) -> None:
        adapters = self._adapters_of[item.base_key]
        del adapters[item.key], self._by_uid[item.meta.uid]
        if not adapters:
            del self._adapters_of[item.base_key]
        for name in names_of(item):
            _discard(self._names, (item.names_in, name), item.key)


def names_of(item: BaseObject | AdapterObject) -> set[str]:
    """Returns its own name and the additional one that its spec claims."""
    return {name for name in (item.meta.name, item.extra_name) if name}


def _claim(item: BaseObject | AdapterObject, name: str) -> tuple[int, float, str]:
    """Orders the objects that claim a name, the one that has it first."""
    has = item.granted_name == item.extra_name == name
    strength = 0 if has else 1 if item.meta.name == name else 2
    return strength, item.meta.created_unix_s, item.meta.uid


def _owned(item: PodObject | ReplicaSetObject | StatefulSetObject | WorkloadObject) -> Owned:
    return Owned(item.meta.namespace, item.meta.uid, item.owner_uid)


def _discard(index: dict[At, set[Key]], at: At, member: Key) -> None:
    members = index.get(at)
    if members is not None:
        members.discard(member)
        if not members:
            del index[at]


class _Parsed(Protocol):
    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self: ...


P = TypeVar("P", bound=_Parsed)
Item = TypeVar("Item")
ParseErrors = (KeyError, TypeError, ValueError)


def parse_or_none(parse: Callable[[Mapping[str, Any]], Item], raw: Mapping[str, Any]) -> Item | None:
    """Parses an object. Returns None, and logs it, if this version cannot parse it."""
    try:
        return parse(raw)
    except ParseErrors as error:
        meta = raw.get("metadata") or {}
        log.warning(
            "object cannot be parsed",
            extra={"object": f"{meta.get('namespace')}/{meta.get('name')}", "error": parse_error_text(error)},
        )
        return None


def parse_own(kind: type[P], key: Key, raw: Mapping[str, Any], unreadable: dict[Key, UnreadableObject]) -> P | None:
    """Parses one of Lorapool's own objects. One that this version cannot parse is kept in `unreadable`, so that a
    condition says so."""
    try:
        item = kind.parse(raw)
    except ParseErrors as error:
        unreadable[key] = UnreadableObject(raw, parse_error_text(error))
        return None
    unreadable.pop(key, None)
    return item


def parse_error_text(error: Exception) -> str:
    """Returns the fields that cannot be parsed, and why, without their values."""
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
