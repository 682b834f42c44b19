"""Which replicas an adapter belongs on: weighted rendezvous hashing, pure.

Called by operator and gateway, which therefore compute the same home without speaking to each
other. A replica that comes or goes moves 1/n of the adapters and no others.
Source: Thaler & Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996; the weighted
form -w/ln(h) is due to Schindelhauer & Schomaker, 2005.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple


class Replica(NamedTuple):
    """A ready, non-draining runtime pod of the base."""

    pod_uid: str
    weight: float = 1.0


class Placed(NamedTuple):
    """One line of the answer to "why here": replicas in order, with the score that put them there."""

    pod_uid: str
    score: float


def placement_order(adapter_uid: str, replicas: Iterable[Replica]) -> list[Placed]:
    """All replicas, best first; the first k are the adapter's home. Deterministic, whatever the order of the input.

    Raises ValueError for a weight that is not finite and above 0.
    """
    placed = [Placed(replica.pod_uid, _score(adapter_uid, replica)) for replica in replicas]
    placed.sort(key=lambda item: (-item.score, item.pod_uid))
    return placed


def home(adapter_uid: str, replicas: Iterable[Replica], k: int) -> list[str]:
    """The uids of the first k replicas in placement order."""
    return [item.pod_uid for item in placement_order(adapter_uid, replicas)[: max(0, k)]]


def explain(adapter_uid: str, replicas: Iterable[Replica]) -> str:
    """The order in words, for events and the log."""
    return (
        ", ".join(f"{item.pod_uid} ({item.score:.3f})" for item in placement_order(adapter_uid, replicas))
        or "no replica"
    )


def _score(adapter_uid: str, replica: Replica) -> float:
    if not (math.isfinite(replica.weight) and replica.weight > 0):
        raise ValueError(f"weight of replica {replica.pod_uid} must be finite and above 0, not {replica.weight}")
    raw = hashlib.blake2b(f"{adapter_uid}\0{replica.pod_uid}".encode(), digest_size=8).digest()
    # 53 bits, shifted by a half, lie strictly between 0 and 1, so the logarithm is finite and not 0.
    unit = ((int.from_bytes(raw, "big") >> 11) + 0.5) / float(1 << 53)
    return -replica.weight / math.log(unit)
