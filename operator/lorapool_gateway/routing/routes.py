"""Resolves a model name for a caller to the weights that the request will run on. Pure.

The table is immutable and replaced whole. An unknown and a forbidden model look the same to a caller, and no name ever
falls back to the base. A name with a slash is a full name, `namespace/name`, and nothing else. One without is the name
of an object, or the alias or served name that the operator granted to one. Among the models of one base owner a granted
name takes precedence over the name of an object, which may have been created later to take its requests. A name that
means several models is refused, unless one of them is in the key's default namespace.

    check -> Target    pinned to the base, or to the adapter's uid and digest
          -> Pending   no digest yet, or the source is being checked again: hold the request
          -> raises    UnprocessableError, UnavailableError
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from lorapool_api.common import BASE_TARGET, AdapterKey, FailureReason
from lorapool_api.openai import ApiError, ModelNotFoundError, UnavailableError, UnprocessableError, client_fault
from lorapool_api.protocol import AdapterDescriptor, descriptor_of
from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.routing.objects import AdapterRoute, BaseRoute, Endpoint, ObjectRef, RuntimeState

Entry = BaseRoute | AdapterRoute

RETRY_AFTER_S = 5.0
"""For errors of unknown duration."""


@dataclass(frozen=True, slots=True)
class RuntimeReplica:
    """A runtime pod: its endpoint, and its own report when there is one."""

    endpoint: Endpoint
    state: RuntimeState | None = None
    """None: its long-poll has not answered yet, or has failed."""
    poll_failed: bool = False
    proven: bool = False
    """It has proved to be this pod of this base. No other is sent a request, or the token with it."""

    @property
    def usable(self) -> bool:
        """Whether requests may be sent to it. The runtime's own report overrides the API server's."""
        if self.endpoint.terminating or not self.proven:
            return False
        if self.state is not None:
            return self.state.ready and not self.state.draining
        return self.endpoint.ready


@dataclass(frozen=True, slots=True)
class Target:
    """The weights that one request runs on: the base, or an adapter at one digest."""

    base: BaseRoute
    adapter: AdapterRoute | None = None
    digest: str | None = None

    @property
    def key(self) -> AdapterKey | None:
        if self.adapter is None or self.digest is None:
            return None
        return AdapterKey(self.adapter.uid, self.digest)

    @property
    def header(self) -> str:
        """Value of the adapter header towards the runtime."""
        return BASE_TARGET if self.key is None else str(self.key)

    @property
    def identity(self) -> str:
        """Value of the adapter header that the runtime's response must have and that the client receives."""
        return BASE_TARGET if self.adapter is None else f"{self.adapter.ref}@{self.digest}"

    def descriptor(self) -> AdapterDescriptor | None:
        """Names the source that the digest was resolved from; the spec's differs while a new one is checked."""
        if self.adapter is None:
            return None
        spec = self.adapter.spec
        if self.adapter.source_uri is not None and self.adapter.source_uri != spec.source.uri:
            source = spec.source.model_copy(update={"uri": self.adapter.source_uri, "revision": None})
            spec = spec.model_copy(update={"source": source})
        return descriptor_of(
            namespace=self.adapter.ref.namespace,
            name=self.adapter.ref.name,
            spec=spec,
            base=self.base.spec,
            revision=self.adapter.revision,
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """Hold the request: the adapter has no digest yet."""

    base: BaseRoute
    adapter: AdapterRoute
    wake: bool
    """Only a runtime can read the source, so the base must be running."""
    late: ApiError
    """The error that the client receives when the wait times out."""


@dataclass(frozen=True, slots=True)
class RouteTable:
    bases: Mapping[ObjectRef, BaseRoute] = field(default_factory=dict)
    adapters: Mapping[ObjectRef, AdapterRoute] = field(default_factory=dict)
    replicas: Mapping[ObjectRef, tuple[RuntimeReplica, ...]] = field(default_factory=dict)
    canonical: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    short: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    extra: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        bases: Iterable[BaseRoute],
        adapters: Iterable[AdapterRoute],
        replicas: Mapping[ObjectRef, tuple[RuntimeReplica, ...]],
    ) -> RouteTable:
        """Builds the table. Of a base and an adapter with the same full name, the older one has it."""
        entries: list[Entry] = [*bases, *adapters]
        entries.sort(key=lambda item: (item.created_unix_s, item.uid))
        canonical: dict[str, list[Entry]] = {}
        short: dict[str, list[Entry]] = {}
        extra: dict[str, list[Entry]] = {}
        for entry in entries:
            canonical.setdefault(str(entry.ref), []).append(entry)
            short.setdefault(entry.ref.name, []).append(entry)
            if entry.extra_name:
                extra.setdefault(entry.extra_name, []).append(entry)
        return cls(
            bases={entry.ref: entry for entry in entries if isinstance(entry, BaseRoute)},
            adapters={entry.ref: entry for entry in entries if isinstance(entry, AdapterRoute)},
            replicas=replicas,
            canonical=_frozen(canonical),
            short=_frozen(short),
            extra=_frozen(extra),
        )

    def find(self, model: str, key: ApiKey) -> Entry:
        """The object with this model name. Raises ModelNotFoundError."""
        if "/" in model:
            found = self._usable(self.canonical.get(model, ()), key)[:1]
        else:
            found = self._meant(self._claims(model, key), key)
        if len(found) != 1:
            raise ModelNotFoundError(model, sorted({str(entry.ref) for entry in found}))
        return found[0]

    def _claims(self, model: str, key: ApiKey) -> list[Entry]:
        """The objects that a short name may mean."""
        granted = self._usable(self.extra.get(model, ()), key)
        taken = {entry.names_in for entry in granted}
        return granted + [
            entry for entry in self._usable(self.short.get(model, ()), key) if entry.names_in not in taken
        ]

    def _usable(self, entries: Iterable[Entry], key: ApiKey) -> list[Entry]:
        """Those that the key may see and whose base admits them: no other object has any influence on a name."""
        return [
            entry
            for entry in entries
            if key.permits(entry.ref) and not (isinstance(entry, AdapterRoute) and self._refused(entry))
        ]

    @staticmethod
    def _meant(claims: list[Entry], key: ApiKey) -> list[Entry]:
        return [entry for entry in claims if entry.ref.namespace == key.default_namespace] or claims

    def resolve(self, model: str, key: ApiKey, now_unix_s: float) -> Target | Pending:
        """`find` and `check` in one call."""
        return self.check(self.find(model, key), now_unix_s)

    def check(self, entry: Entry, now_unix_s: float) -> Target | Pending:
        """The weights that a request for this object runs on now. Raises UnprocessableError, UnavailableError."""
        if isinstance(entry, BaseRoute):
            self._refuse_without_pods(entry)
            return Target(entry)
        base = self.bases.get(entry.base_ref)
        if base is None:
            raise UnavailableError(
                f"BaseModel {entry.base_ref} of `{entry.ref}` does not exist.",
                param="model",
                code="base_not_found",
                retry_after_s=RETRY_AFTER_S,
            )
        self._refuse_without_pods(base)
        return _check(entry, base, now_unix_s)

    def _refuse_without_pods(self, base: BaseRoute) -> None:
        """Raises UnavailableError for a base that has no replica and whose pods cannot start."""
        if base.obstacle and not any(replica.usable for replica in self.replicas_of(base)):
            raise UnavailableError(
                f"BaseModel {base.ref} cannot start: {base.obstacle}",
                param="model",
                code="base_unavailable",
                retry_after_s=RETRY_AFTER_S,
            )

    def visible(self, key: ApiKey) -> list[Entry]:
        """The model list: bases, then adapters, sorted by name, without adapters that no request could use."""
        bases = [base for base in self.bases.values() if key.permits(base.ref)]
        adapters = [
            adapter
            for adapter in self.adapters.values()
            if key.permits(adapter.ref) and not adapter.spec.suspend and not self._refused(adapter)
        ]
        bases.sort(key=lambda item: item.ref)
        adapters.sort(key=lambda item: item.ref)
        return [*bases, *adapters]

    def names_of(self, entry: Entry, key: ApiKey) -> list[str]:
        """The model names under which the list shows an object: its full name, and its alias if that leads to it."""
        found = [str(entry.ref)]
        if entry.extra_name and self._leads_to(entry.extra_name, entry, key):
            found.append(entry.extra_name)
        return found

    def _leads_to(self, model: str, entry: Entry, key: ApiKey) -> bool:
        try:
            return self.find(model, key) is entry
        except ModelNotFoundError:
            return False

    def replicas_of(self, base: BaseRoute) -> tuple[RuntimeReplica, ...]:
        """The replicas of this very object: a recreated base never adopts the pods of its predecessor."""
        return tuple(replica for replica in self.replicas.get(base.ref, ()) if replica.endpoint.base_uid == base.uid)

    def _refused(self, adapter: AdapterRoute) -> bool:
        """Whether the base does not, or no longer, admit this adapter's namespace.

        A base of another namespace that does not exist is the same to a guest as one that does not admit it.
        """
        base = self.bases.get(adapter.base_ref)
        if base is None:
            return adapter.base_ref.namespace != adapter.ref.namespace
        return not base.admits(adapter.ref.namespace)


def start_refusal(base: BaseRoute, now_unix_s: float) -> ApiError | None:
    """The error of a request that would have to start a base again too soon after a failed start; None for no error."""
    if base.desired_replicas > 0 or now_unix_s >= base.next_start_unix_s:
        return None
    return UnavailableError(
        f"{base.ref} failed to start ({base.failed_start}). It may be started again in "
        f"{base.next_start_unix_s - now_unix_s:.0f} s.",
        param="model",
        code="base_start_failed",
        retry_after_s=max(1.0, base.next_start_unix_s - now_unix_s),
    )


def _check(adapter: AdapterRoute, base: BaseRoute, now_unix_s: float) -> Target | Pending:
    if adapter.spec.suspend:
        raise UnprocessableError(
            f"`{adapter.ref}` is suspended. Set spec.suspend to false to serve it.",
            param="model",
            code="adapter_suspended",
        )
    failure = _failure(adapter, now_unix_s)
    if failure is not None and isinstance(failure, UnprocessableError):
        raise failure
    if adapter.digest is not None:
        return Target(base, adapter, adapter.digest)
    if failure is not None and not adapter.awaiting_runtime and _retry_in_s(adapter, now_unix_s) > 0:
        raise failure  # the source is known to be down until its next check
    late = failure or UnavailableError(
        f"`{adapter.ref}` is not ready yet{': ' + adapter.message if adapter.message else ''}.",
        param="model",
        code="adapter_not_ready",
        retry_after_s=RETRY_AFTER_S,
    )
    return Pending(base, adapter, wake=adapter.awaiting_runtime, late=late)


def _failure(adapter: AdapterRoute, now_unix_s: float) -> ApiError | None:
    """The failure that blocks requests. None if it concerns an older spec, or if an older digest still serves."""
    if adapter.failure is None or adapter.ready or not adapter.status_is_current:
        return None
    failure = adapter.failure
    retry_after_s = max(1.0, _retry_in_s(adapter, now_unix_s)) if failure.retry_at is not None else None
    message = f"`{adapter.ref}` cannot be served: {failure.message}"
    try:
        reason = FailureReason(failure.reason)
    except ValueError:  # a reason of a newer operator
        if failure.retry_at is None:
            return UnprocessableError(message, param="model", code="adapter_failed")
        return UnavailableError(message, param="model", code="adapter_failed", retry_after_s=retry_after_s)
    return client_fault(reason, message, retry_after_s)


def _retry_in_s(adapter: AdapterRoute, now_unix_s: float) -> float:
    """Seconds until the operator checks a failed source again; not positive if that is due, or if none is planned."""
    if adapter.failure is None or adapter.failure.retry_at is None:
        return 0.0
    return _unix_s(adapter.failure.retry_at) - now_unix_s


def _unix_s(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _frozen(index: Mapping[str, list[Entry]]) -> Mapping[str, tuple[Entry, ...]]:
    return {name: tuple(entries) for name, entries in index.items()}
