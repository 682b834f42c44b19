"""Stored objects reduced to what a request needs, parsed once at the door. Pure.

Called by watch for each event. Two equal values mean that nothing a request could notice has changed, so a
status write that only counts usage rebuilds no table. A value that cannot be parsed raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.common import LABEL_BASE, LABEL_BASE_UID, AdapterCondition, Reason, duration_s
from lorapool_api.loraadapter import FailureStatus, LoraAdapterSpec, LoraAdapterStatus
from lorapool_api.protocol import RUNTIME_PORT, AdapterState, RuntimeSnapshot, Tier

PORT_NAME = "http"


class ObjectRef(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class BaseRoute:
    ref: ObjectRef
    uid: str
    created_unix_s: float
    spec: BaseModelSpec = field(repr=False)
    max_wait_s: float
    max_queued: int

    @property
    def desired_replicas(self) -> int:
        """What the scale subresource asks for; an unset count means the minimum."""
        replicas = self.spec.replicas
        return replicas if replicas is not None else self.spec.scaling.min_replicas

    def admits(self, namespace: str) -> bool:
        return namespace == self.ref.namespace or namespace in self.spec.access.namespaces


@dataclass(frozen=True, slots=True)
class AdapterRoute:
    ref: ObjectRef
    uid: str
    created_unix_s: float
    base_ref: ObjectRef
    spec: LoraAdapterSpec = field(repr=False)
    judged: bool
    """The status speaks about the present spec."""
    ready: bool
    digest: str | None
    revision: str | None
    source_uri: str | None
    """Where digest was resolved from; differs from the spec's while a new source is judged."""
    awaiting_runtime: bool
    failure: FailureStatus | None
    message: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of an EndpointSlice."""

    base_ref: ObjectRef
    base_uid: str | None
    pod_uid: str
    pod_name: str
    url: str
    ready: bool
    terminating: bool


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """A runtime's last snapshot, reduced to what picking needs."""

    boot_id: str
    ready: bool
    draining: bool
    in_flight: int
    loaded: frozenset[tuple[str, str]]
    """(uid, digest) of adapters that answer without a load."""


def base_route(raw: Mapping[str, Any]) -> BaseRoute:
    metadata = raw["metadata"]
    spec = BaseModelSpec.model_validate(raw.get("spec") or {})
    return BaseRoute(
        ref=_ref(metadata),
        uid=str(metadata["uid"]),
        created_unix_s=_unix_s(metadata),
        spec=spec,
        max_wait_s=duration_s(spec.cold_start.max_wait),
        max_queued=spec.cold_start.max_queued,
    )


def adapter_route(raw: Mapping[str, Any]) -> AdapterRoute:
    metadata = raw["metadata"]
    spec = LoraAdapterSpec.model_validate(raw.get("spec") or {})
    status = LoraAdapterStatus.model_validate(raw.get("status") or {})
    conditions = {condition.type: condition for condition in status.conditions}
    ready = conditions.get(AdapterCondition.READY)
    resolved = conditions.get(AdapterCondition.RESOLVED)
    return AdapterRoute(
        ref=_ref(metadata),
        uid=str(metadata["uid"]),
        created_unix_s=_unix_s(metadata),
        base_ref=ObjectRef(spec.base_model_ref.namespace or metadata["namespace"], spec.base_model_ref.name),
        spec=spec,
        judged=status.observed_generation is not None
        and status.observed_generation >= int(metadata.get("generation", 0)),
        ready=ready is not None and ready.status == "True",
        digest=status.digest,
        revision=status.revision,
        source_uri=status.source_uri,
        awaiting_runtime=resolved is not None and resolved.reason == Reason.AWAITING_RUNTIME,
        failure=status.failure,
        message=ready.message if ready is not None else "",
    )


def endpoints(raw: Mapping[str, Any]) -> Iterator[Endpoint]:
    """The pods behind one EndpointSlice; nothing where its labels name no base."""
    metadata = raw["metadata"]
    labels = metadata.get("labels") or {}
    base = labels.get(LABEL_BASE)
    if not base:
        return
    port = _port(raw.get("ports") or [])
    for item in raw.get("endpoints") or []:
        addresses = item.get("addresses") or []
        pod = item.get("targetRef") or {}
        if not addresses or not pod.get("uid"):
            continue
        host = str(addresses[0])
        conditions = item.get("conditions") or {}
        yield Endpoint(
            base_ref=ObjectRef(str(metadata["namespace"]), str(base)),
            base_uid=labels.get(LABEL_BASE_UID),
            pod_uid=str(pod["uid"]),
            pod_name=str(pod.get("name", "")),
            url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
            ready=conditions.get("ready") is not False,  # absent means ready, says the API
            terminating=bool(conditions.get("terminating")),
        )


def runtime_state(snapshot: RuntimeSnapshot) -> RuntimeState:
    return RuntimeState(
        boot_id=snapshot.boot_id,
        ready=snapshot.ready,
        draining=snapshot.draining,
        in_flight=snapshot.in_flight + snapshot.waiting,
        loaded=frozenset(
            (item.uid, item.digest)
            for item in snapshot.adapters
            if item.state is AdapterState.LOADED and item.tier is Tier.DEVICE
        ),
    )


def _ref(metadata: Mapping[str, Any]) -> ObjectRef:
    return ObjectRef(str(metadata["namespace"]), str(metadata["name"]))


def _unix_s(metadata: Mapping[str, Any]) -> float:
    text = str(metadata.get("creationTimestamp") or "")
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _port(ports: list[Mapping[str, Any]]) -> int:
    named = [item for item in ports if item.get("name") == PORT_NAME] or ports
    return int(named[0].get("port") or RUNTIME_PORT) if named else RUNTIME_PORT
