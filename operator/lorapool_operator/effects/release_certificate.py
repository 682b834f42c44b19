"""Keeps a valid certificate of the release's authority for its store or ledger, in a Secret that their pods mount."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from lorapool_api.common import FIELD_MANAGER, LABEL_COMPONENT, LABEL_MANAGED_BY, LABEL_NAME
from lorapool_api.pod_address import CERTIFICATE, KEY
from lorapool_operator.effects.authority import Authority, Pair
from lorapool_operator.effects.cluster import ObjectNotFoundError, PlanTarget

log = logging.getLogger(__name__)


class ReleaseCertificate:
    """The certificate of one component, `store` or `ledger`, whose name takes the place of a base's uid in it
    (`STORE_SERVER_NAME`, `LEDGER_SERVER_NAME`)."""

    def __init__(
        self,
        cluster: PlanTarget,
        authority: Authority,
        namespace: str,
        name: str,
        component: str,
        *,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._authority = authority
        self._namespace = namespace
        self._name = name
        self._component = component
        self._now_unix_s = now_unix_s

    async def ensure(self) -> None:
        """Writes the Secret unless it has a valid certificate that is not due for renewal. Raises ClusterError."""
        issuer, now_s = self._authority.issuer(), self._now_unix_s()
        if now_s < issuer.renewal_s(await self._present(), self._component):
            return
        log.info("issuing a certificate for the release's %s", self._component)
        pair = issuer.issue(self._component, datetime.fromtimestamp(now_s, UTC))
        data = {name: base64.b64encode(value).decode() for name, value in zip((CERTIFICATE, KEY), pair, strict=True)}
        component = self._component
        labels = {LABEL_NAME: f"lorapool-{component}", LABEL_COMPONENT: component, LABEL_MANAGED_BY: FIELD_MANAGER}
        metadata = {"name": self._name, "namespace": self._namespace, "labels": labels}
        await self._cluster.apply_child({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})

    async def _present(self) -> Pair:
        try:
            data = (await self._cluster.get("Secret", self._namespace, self._name)).get("data") or {}
        except ObjectNotFoundError:
            return Pair(b"", b"")
        return Pair(*(base64.b64decode(data.get(name, "")) for name in (CERTIFICATE, KEY)))
