"""Prints objects whose state has changed as `kubectl get` would, and the operator's warnings, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorapool_api.common import Reason
from lorapool_gateway.routing.source import ref_of
from lorapool_operator.decisions.plan import KubeEvent, KubeEventType
from lorapool_operator.effects.cluster import Subject
from lorapool_serve.objects import ADAPTER, BASE, Objects, Raw
from lorapool_serve.table import state, table

UNSETTLED = (Reason.STARTING, Reason.PENDING)


class Console:
    def __init__(self) -> None:
        self._shown: dict[tuple[str, str], tuple[str, ...]] = {}
        self._warned: set[tuple[str, str]] = set()

    def line(self, text: str) -> None:
        print(text, flush=True)

    def event(self, event: KubeEvent, subject: Subject) -> None:
        """Prints a warning, once for each message of an object."""
        about = f"{subject.kind} {subject.namespace}/{subject.name}"
        if event.type is KubeEventType.WARNING and (about, event.message) not in self._warned:
            self._warned.add((about, event.message))
            self.line(f"Warning   {event.reason}   {about}: {event.message}")

    def changes(self, objects: Objects) -> None:
        """Prints the objects whose state differs from what was printed last."""
        for kind in (BASE, ADAPTER):
            changed = [raw for raw in objects.of(kind) if raw.get("status") and self._is_new(kind, raw)]
            if changed:
                self.line("\n" + table(kind, changed))

    def _is_new(self, kind: str, raw: Raw) -> bool:
        key, now = (kind, raw["metadata"]["uid"]), state(kind, raw)
        before, self._shown[key] = self._shown.get(key), now
        return before != now


def condition(raw: Mapping[str, Any], type_: str = "Ready") -> Mapping[str, Any]:
    """One condition of an object's status; empty if there is none."""
    found = (raw.get("status") or {}).get("conditions", [])
    return next((item for item in found if item["type"] == type_), {})


def started(objects: Objects) -> bool:
    """Whether every base is ready or has failed."""
    return all(condition(raw).get("reason", Reason.PENDING) not in UNSETTLED for raw in objects.of(BASE))


def settled(objects: Objects) -> bool:
    """Whether every base and adapter is ready or has failed."""
    return started(objects) and all(condition(raw).get("status") in ("True", "False") for raw in objects.of(ADAPTER))


def models(objects: Objects) -> list[str]:
    """The names of the bases and adapters that are ready."""
    raws = [*objects.of(BASE), *objects.of(ADAPTER)]
    return [str(ref_of(raw)) for raw in raws if condition(raw).get("status") == "True"]
