"""Which pods are ejected for a while because attempts at them failed: passive outlier detection, pure.

A failure ejects a pod for EJECTION_S, each further one in a row for twice as long, up to EJECTION_MAX_S. An ejected pod
is only tried after all others. An attempt that the pod answers, also with a refusal, ends the row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EJECTION_S = 1.0
EJECTION_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class _Ejection:
    failures: int
    until_s: float


@dataclass(slots=True)
class Outliers:
    _pods: dict[str, _Ejection] = field(default_factory=dict)

    def failed(self, pod_uid: str, now_s: float) -> None:
        """Counts an attempt that the pod did not answer, unless the pod is ejected already."""
        known = self._pods.get(pod_uid, _Ejection(0, now_s))
        if now_s < known.until_s:
            return
        ejection_s = min(EJECTION_MAX_S, EJECTION_S * 2**known.failures)
        self._pods[pod_uid] = _Ejection(known.failures + 1, now_s + ejection_s)
        self._forget(now_s)

    def answered(self, pod_uid: str) -> None:
        self._pods.pop(pod_uid, None)

    def ejected(self, now_s: float) -> frozenset[str]:
        """The pods that are ejected now, by uid."""
        if not self._pods:
            return frozenset()
        return frozenset(pod_uid for pod_uid, known in self._pods.items() if now_s < known.until_s)

    def _forget(self, now_s: float) -> None:
        """Forgets pods that have not failed for long, most of which do not exist any more."""
        for pod_uid, known in list(self._pods.items()):
            if now_s >= known.until_s + EJECTION_MAX_S:
                del self._pods[pod_uid]
