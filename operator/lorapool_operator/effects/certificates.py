"""Keeps a valid certificate for the runtimes of each base, in one Secret per namespace.

The Secret has the same name everywhere, so that the operator needs rights on Secrets of this name alone. A pod mounts
the entries of its own base. A renewed entry reaches running pods by the kubelet, and restarts none.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from lorapool_operator.decisions.runtime_tls import TLS_SECRET, certificates_secret, tls_entries
from lorapool_operator.effects.authority import Authority, Issuer, Pair
from lorapool_operator.effects.cluster import ObjectNotFoundError, PlanTarget
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, ObjectKind

log = logging.getLogger(__name__)

RECHECK_S = 30.0
"""How often a Secret is read again, so that one that was changed or deleted is written again."""


class _Entry(NamedTuple):
    pair: Pair
    renewal_s: float
    """When it is to be renewed, in Unix time."""


class _Checked(NamedTuple):
    """What one look at a namespace's Secret has shown."""

    at_s: float
    issuer: Issuer
    entries: Mapping[str, _Entry]
    """By base uid."""


class Certificates:
    def __init__(
        self,
        cluster: PlanTarget,
        cache: ClusterCache,
        authority: Authority,
        *,
        now_unix_s: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._authority = authority
        self._now_unix_s = now_unix_s
        self._clock = clock
        self._checked: dict[str, _Checked] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure(self, base: BaseObject) -> None:
        """Writes the Secret of the base's namespace unless it has a valid certificate for each base there.

        Raises ClusterError.
        """
        namespace, issuer = base.meta.namespace, self._authority.issuer()
        async with self._locks[namespace]:
            known = self._checked.get(namespace)
            if known is None or known.issuer is not issuer:
                known = _Checked(-RECHECK_S, issuer, {})
            if base.meta.uid not in known.entries or self._clock() - known.at_s >= RECHECK_S:
                self._checked[namespace] = await self._check(base, known)

    async def _check(self, base: BaseObject, known: _Checked) -> _Checked:
        namespace = base.meta.namespace
        bases = {item.meta.uid: item for item in (base, *self._cache.bases) if item.meta.namespace == namespace}
        found = await self._read(namespace)
        entries = {uid: self._entry(item, found, known) for uid, item in bases.items()}
        wanted = self._of_others(namespace, found, bases)
        for uid, entry in entries.items():
            wanted |= dict(zip(tls_entries(uid), entry.pair, strict=True))
        if wanted != found:
            await self._cluster.apply_child(certificates_secret(namespace, list(bases.values()), wanted))
        return _Checked(self._clock(), known.issuer, entries)

    def _entry(self, base: BaseObject, found: Mapping[str, bytes], known: _Checked) -> _Entry:
        """Returns what the Secret has for a base, or a new certificate where that is due."""
        uid, issuer, now_s = base.meta.uid, known.issuer, self._now_unix_s()
        pair = Pair(*(found.get(name, b"") for name in tls_entries(uid)))
        entry = known.entries.get(uid)
        if entry is None or entry.pair != pair:
            entry = _Entry(pair, issuer.renewal_s(pair, uid))
        if now_s < entry.renewal_s:
            return entry
        log.info("issuing a certificate for the runtimes of a base", extra={"base": str(base.key)})
        made = issuer.issue(uid, datetime.fromtimestamp(now_s, UTC))
        return _Entry(made, issuer.renewal_s(made, uid))

    def _of_others(
        self, namespace: str, found: Mapping[str, bytes], bases: Mapping[str, BaseObject]
    ) -> dict[str, bytes]:
        """Returns the entries that are kept although no readable base needs them.

        The entry of a deleted base goes, but only where all bases are known.
        """
        if {namespace, None} & self._cache.unlisted:
            return dict(found)
        unreadable = (
            str(item.raw["metadata"]["uid"])
            for key, item in self._cache.unreadable.items()
            if key.namespace == namespace and key.kind is ObjectKind.BASE
        )
        names = {name for uid in (*unreadable, *bases) for name in tls_entries(uid)}
        return {name: value for name, value in found.items() if name in names}

    async def _read(self, namespace: str) -> dict[str, bytes]:
        try:
            secret = await self._cluster.get("Secret", namespace, TLS_SECRET)
        except ObjectNotFoundError:
            return {}
        return {name: base64.b64decode(value) for name, value in (secret.get("data") or {}).items()}
