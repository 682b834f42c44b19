"""Orders the replicas of a base by an adapter's preference: weighted rendezvous hashing, pure.

Operator and gateway compute the same preferred replicas without communicating. Adding or removing one of n replicas
moves about 1/n of the adapters. Sources: Thaler & Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996, and
Schindelhauer & Schomaker, 2005, for the weighted form -w/ln(h).
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


def placement_order(adapter_uid: str, replicas: Iterable[Replica]) -> list[str]:
    """The pod uids of all replicas, preferred first. The order of the input does not matter.

    Raises ValueError for a weight that is not finite and above 0.
    """
    ordered = sorted(replicas, key=lambda replica: (-_score(adapter_uid, replica), replica.pod_uid))
    return [replica.pod_uid for replica in ordered]


def _score(adapter_uid: str, replica: Replica) -> float:
    if not (math.isfinite(replica.weight) and replica.weight > 0):
        raise ValueError(f"weight of replica {replica.pod_uid} must be finite and above 0, not {replica.weight}")
    raw = hashlib.blake2b(f"{adapter_uid}\0{replica.pod_uid}".encode(), digest_size=8).digest()
    # 53 bits plus one half, scaled to strictly between 0 and 1, so that the logarithm is finite and not 0.
    unit = ((int.from_bytes(raw, "big") >> 11) + 0.5) / float(1 << 53)
    return -replica.weight / math.log(unit)
