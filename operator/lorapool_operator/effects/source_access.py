"""With whose rights sources are read: the administrator's policy, and the namespaces' own credentials.

A namespace's own credentials are a Secret in it. It is read by its name alone and only with the label that permits it,
and stays in memory. The runtimes of the bases that the namespace uses receive a copy, since they fetch the files.
"""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from lorapool_api.basemodel import Access
from lorapool_api.common import LABEL_SOURCE_CREDENTIALS
from lorapool_api.protocol import NamespaceCredentials
from lorapool_api.store_protocol import StoreAccess
from lorapool_artifacts.policy import Rights, SourcePolicy, SourceRules
from lorapool_artifacts.settings import STORE_CA, STORE_TOKEN, STORE_URL, TENANT_CREDENTIALS
from lorapool_operator.effects.cluster import ClusterError, ObjectNotFoundError
from lorapool_operator.effects.runtime_calls import RuntimeCallError
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key

log = logging.getLogger(__name__)

REREAD_S = 30.0
"""A Secret that is in use is read again after this time."""

Credentials = Mapping[str, str]


def credentials_of(secret: Mapping[str, Any]) -> Credentials:
    """Returns the credentials in a Secret by the names of their variables; none without the label. Ignores others."""
    labels = (secret.get("metadata") or {}).get("labels") or {}
    if labels.get(LABEL_SOURCE_CREDENTIALS) != "true":
        return {}
    found = {}
    for name, encoded in (secret.get("data") or {}).items():
        if name in TENANT_CREDENTIALS:
            try:
                found[name] = base64.b64decode(encoded, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                log.warning("%s of a namespace's credentials is not text and is ignored", name)
    return found


class SourceAccess:
    """The process replaces the policy when its file changes."""

    def __init__(
        self,
        policy: SourcePolicy | None = None,
        *,
        read: Callable[[str, str], Awaitable[Mapping[str, Any]]] | None = None,
        secret: str = "",
        store: Callable[[str], StoreAccess | None] = lambda _namespace: None,
    ) -> None:
        """`read(namespace, name)` returns a Secret. `secret` is its name where the policy has none; empty: none is.
        `store(namespace)` gives access to a namespace's objects in the release's store, if there is one."""
        self.policy = policy or SourcePolicy()
        self._read = read
        self._secret = secret
        self._store = store
        self._own: dict[str, tuple[float, Credentials]] = {}
        self._rules: dict[Key, tuple[Access, SourcePolicy, SourceRules]] = {}

    def rules_of(self, base: BaseObject) -> SourceRules:
        """Returns the rules for the sources of a base and of its adapters."""
        access, policy = base.spec.access, self.policy
        known = self._rules.get(base.key)
        if known is None or known[0] != access or known[1] is not policy:
            rules = SourceRules.of(base.meta.namespace, access, policy)
            known = self._rules[base.key] = (access, policy, rules)
        return known[2]

    def forget_base(self, key: Key) -> None:
        """Drops the rules of a deleted base."""
        self._rules.pop(key, None)

    async def credentials(self, namespace: str, rights: Rights) -> Credentials | None:
        """Returns the credentials to read a source with; None for the operator's own."""
        return None if rights is Rights.SHARED else await self.own(namespace)

    async def own(self, namespace: str) -> Credentials:
        """Returns the credentials of a namespace, with those for its objects in the store."""
        return {**await self._of_secret(namespace), **self.of_store(namespace)}

    def of_store(self, namespace: str) -> Credentials:
        """Returns how a namespace reads its objects in the store; nothing if there is no store."""
        access = self._store(namespace)
        return {} if access is None else {STORE_URL: access.url, STORE_TOKEN: access.token, STORE_CA: access.ca}

    async def _of_secret(self, namespace: str) -> Credentials:
        """Returns what its Secret has, at most `REREAD_S` old unless it cannot be read."""
        read_at, known = self._own.get(namespace, (-REREAD_S, {}))
        if time.monotonic() < read_at + REREAD_S:
            return known
        name = self.policy.secret_of(namespace, self._secret)
        if name and self._read is not None:
            try:
                known = credentials_of(await self._read(namespace, name))
            except ObjectNotFoundError:
                known = {}
            except ClusterError as error:
                log.warning(
                    "the credentials of a namespace cannot be read", extra={"object": namespace, "error": str(error)}
                )
        self._own[namespace] = (time.monotonic(), known)
        return known


class CredentialDelivery:
    """Gives runtimes the credentials of the namespaces that use their base, again after each change."""

    def __init__(self, cache: ClusterCache, runtimes: RuntimeTracker, access: SourceAccess) -> None:
        self._cache = cache
        self._runtimes = runtimes
        self._access = access
        self._known: dict[str, Credentials] = {}
        self._delivered: dict[str, NamespaceCredentials] = {}
        """By boot id."""

    async def run_once(self) -> bool:
        """Delivers what is new. Returns True if credentials changed that were read before."""
        changed, alive = False, set()
        for base in list(self._cache.bases):
            wanted = await self._wanted(base)
            changed |= any(self._known.get(name, own) != own for name, own in wanted.namespaces.items())
            self._known |= wanted.namespaces
            for view in self._runtimes.views_of(base):
                if view.current is not None:
                    alive.add(view.current.boot_id)
                    await self._deliver(view.pod_uid, view.current.boot_id, wanted)
        self._delivered = {boot_id: sent for boot_id, sent in self._delivered.items() if boot_id in alive}
        return changed

    async def _wanted(self, base: BaseObject) -> NamespaceCredentials:
        rules = self._access.rules_of(base)
        users = {adapter.meta.namespace for adapter in self._cache.adapters_of(base.key)}
        own = {name for name in users if rules.uses_own_credentials(name)}
        found = {name: await self._access.own(name) for name in own}
        found |= {name: given for name in users - own if (given := self._access.of_store(name))}
        return NamespaceCredentials(namespaces={name: dict(found[name]) for name in sorted(found)})

    async def _deliver(self, pod_uid: str, boot_id: str, wanted: NamespaceCredentials) -> None:
        if self._delivered.get(boot_id, NamespaceCredentials()) == wanted:
            return
        try:
            await self._runtimes.give_credentials(pod_uid, wanted)
        except RuntimeCallError as error:
            log.info("credentials not delivered; tried again", extra={"replica": pod_uid, "error": str(error)})
        else:
            self._delivered[boot_id] = wanted
