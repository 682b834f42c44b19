"""The ConfigMap in the operator's own namespace that keeps how many tokens each namespace trained this month.

Tenants cannot write there. It is written once in `RECORD_S` while jobs train, and before a job's object may go.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pydantic import ValidationError

from lorapool_api.common import LABEL_MANAGED_BY
from lorapool_operator.decisions.pods import MANAGED_BY
from lorapool_operator.decisions.tuning.tokens import MonthRecord
from lorapool_operator.effects.cluster import Cluster, ObjectConflictError, ObjectNotFoundError

log = logging.getLogger(__name__)

RECORD_S = 30.0


class TokenRecord:
    """Belongs to one event loop."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._version: str | None = None
        """None: it was not read."""
        self._records: dict[str, MonthRecord] = {}
        self._written_unix_s = 0.0

    @property
    def known(self) -> bool:
        return self._version is not None

    def of(self, namespace: str) -> MonthRecord:
        """What is recorded of a namespace."""
        return self._records.get(namespace, MonthRecord())

    async def read(self) -> None:
        """Raises ClusterError."""
        try:
            raw = await self._cluster.get("ConfigMap", self._namespace, self._name)
        except ObjectNotFoundError:
            self._version, self._records = "", {}
            return
        self._version = str(raw["metadata"]["resourceVersion"])
        self._records = {name: self._parsed(name, text) for name, text in (raw.get("data") or {}).items()}

    async def write(self, records: Mapping[str, MonthRecord], now: float, *, at_once: bool = False) -> None:
        """Writes those that changed, if it is time to. Raises ClusterError; after a conflict it is read again."""
        changed = {name: record for name, record in records.items() if record != self.of(name)}
        if not changed or self._version is None or (not at_once and now < self._written_unix_s + RECORD_S):
            return
        data = {name: record.model_dump_json() for name, record in changed.items()}
        metadata = {"name": self._name, "namespace": self._namespace}
        try:
            if not self._version:
                labels = {LABEL_MANAGED_BY: MANAGED_BY}
                manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {**metadata, "labels": labels}}
                raw = await self._cluster.create({**manifest, "data": data})
            else:
                raw = await self._cluster.patch_data("ConfigMap", self._namespace, self._name, self._version, data)
        except (ObjectConflictError, ObjectNotFoundError):
            self._version = None
            raise
        self._version, self._written_unix_s = str(raw["metadata"]["resourceVersion"]), now
        self._records |= changed

    def _parsed(self, namespace: str, text: str) -> MonthRecord:
        try:
            return MonthRecord.model_validate_json(text)
        except ValidationError:
            log.error(
                "trained tokens cannot be read; counting begins again",
                extra={"object": f"{self._namespace}/{self._name}", "error": f"key {namespace}"},
            )
            return MonthRecord()
