"""Which adapters the pods of a rollout load before they are ready: those that the pods to be replaced have loaded.

The list is a file next to the token hashes, so that a pod starts without the operator. It is only there while a
rollout is under way: a base that wakes, or grows, does not wait for adapters that no request may want.
"""

from __future__ import annotations

from lorapool_api.protocol import Preload, PreloadList, SourceRef, descriptor_of
from lorapool_operator.decisions.scaling.rollout import RolloutDecision
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject
from lorapool_operator.world.observed import AdapterSummary, ObservedBase


def hot_set(observed: ObservedBase, rollout: RolloutDecision) -> PreloadList:
    """Returns the adapters to load first: spread ones before others, then the most recently used, one a slot."""
    if not rollout.replaces:
        return PreloadList()
    loaded = [(item, item.preload) for item in observed.adapters if item.preload is not None]
    loaded.sort(key=lambda pair: _wanted(pair[0]), reverse=True)
    chosen = [preload for _, preload in loaded[: observed.base.spec.lora.slots]]
    return PreloadList(adapters=sorted(chosen, key=lambda item: item.uid))


def _wanted(adapter: AdapterSummary) -> tuple[int, str, str]:
    return adapter.preferred_replicas, adapter.last_used, adapter.display


def preload_of(adapter: AdapterObject, base: BaseObject) -> Preload | None:
    """Returns how a runtime loads what the adapter's status serves; None without a digest."""
    status, spec = adapter.status, adapter.spec
    if status.digest is None:
        return None
    made = descriptor_of(
        namespace=adapter.meta.namespace,
        name=adapter.meta.name,
        spec=spec,
        base=base.spec,
        revision=status.revision,
        load=True,
    )
    if status.source_uri is not None and status.source_uri != spec.source.uri:
        made = made.model_copy(update={"source": SourceRef(uri=status.source_uri, revision=status.revision)})
    return Preload(uid=adapter.meta.uid, digest=status.digest, descriptor=made)
