"""The present from what the process watches: adapters with where they are loaded, jobs, and limits with their use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lorapool_api.quota_protocol import BILLIONTHS, Meter
from lorapool_api.tuning.finetunejob_status import FineTuneJobStatus
from lorapool_gateway.routing.live_tables import KeySource, RouteSource
from lorapool_gateway.routing.objects import AdapterRoute, ObjectRef, unix_s
from lorapool_gateway.routing.source import Kind, ObjectCache, ObjectSource
from lorapool_ledger.console.live import AdapterNow, JobNow, LimitNow
from lorapool_ledger.reports.periods import month, month_of
from lorapool_ledger.reports.scope import Scope

MOST_LIMITS = 200
_METERS = {
    Meter.REQUESTS_PER_MINUTE: ("requests per minute", "requests"),
    Meter.TOKENS_PER_MINUTE: ("tokens per minute", "tokens"),
    Meter.TOKENS_PER_MONTH: ("tokens per month", "tokens"),
    Meter.MONEY_PER_MONTH: ("money per month", "money"),
}


@dataclass(frozen=True, slots=True)
class Use:
    """A quota that is in use."""

    scope: str
    """`key/<uid>`, `project/<namespace>` or `model/<namespace>/<name>`."""
    meter: Meter
    limit: int
    used: int


class LiveObjects:
    def __init__(
        self,
        routes: RouteSource,
        keys: KeySource,
        uses: Callable[[], Awaitable[Iterable[tuple[str, Meter, int, int]]]],
        *,
        currency: Callable[[], str] = lambda: "",
        now_unix_s: Callable[[], float],
    ) -> None:
        """`uses()` are (scope, meter, limit, used) of the quotas that are in use; `currency()` is that of money."""
        self._currency = currency
        self._routes = routes
        self._keys = keys
        self._uses = uses
        self._now_unix_s = now_unix_s
        self._jobs: Sequence[ObjectCache[JobNow]] = ()

    def watch_jobs(self, source: ObjectSource) -> None:
        """Shows fine-tuning jobs. Called before the source runs."""
        self._jobs = source.caches(Kind.JOBS, job_now, lambda: None)

    def adapter(self, model: str) -> AdapterNow | None:
        namespace, _, name = model.partition("/")
        found = self._routes.table.adapters.get(ObjectRef(namespace, name))
        if found is None:
            return None
        key = (found.uid, found.digest)
        loaded = tuple(
            replica.endpoint.pod_name
            for replica in self._routes.table.replicas.get(found.base_ref, ())
            if replica.state is not None and key in replica.state.loaded
        )
        return AdapterNow(
            model=model,
            base=str(found.base_ref),
            ready=found.ready,
            state=_why(found, len(loaded)),
            digest=found.digest or "",
            loaded_on=loaded,
            preferred_replicas=found.preferred_replicas,
        )

    def jobs(self, projects: frozenset[str] | None) -> Sequence[JobNow]:
        found = [job for cache in self._jobs for job in cache.objects.values()]
        permitted = [job for job in found if projects is None or job.namespace in projects]
        return sorted(permitted, key=lambda job: (-job.created_unix_s, job.namespace, job.name))

    async def limits(self, scope: Scope) -> Sequence[LimitNow]:
        names = {key.uid: key.id for key in self._keys.table}
        projects_of = {key.uid: key.namespaces for key in self._keys.table}
        uses = {(found[0], found[1]): Use(*found) for found in await self._uses()}
        for key in self._keys.table:  # also those that no gateway has asked for
            for meter, limit in key.quotas:
                if not meter.is_budget:
                    uses.setdefault((f"key/{key.uid}", meter), Use(f"key/{key.uid}", meter, limit, 0))
        end = month(month_of(self._now_unix_s()))
        found = [
            _limit(
                use,
                names,
                self._currency() or "USD",
                end.end_unix_s if end is not None and use.meter.is_budget else None,
            )
            for use in uses.values()
            if _permitted(use.scope, scope, projects_of)
        ]
        return sorted(found, key=lambda item: (-item.share, item.subject, item.meter))[:MOST_LIMITS]


def job_now(raw: Mapping[str, Any]) -> JobNow:
    """Parses a FineTuneJob."""
    metadata, spec = raw["metadata"], raw.get("spec") or {}
    status = FineTuneJobStatus.model_validate(raw.get("status") or {})
    base = spec.get("baseModelRef") or {}
    return JobNow(
        namespace=str(metadata["namespace"]),
        name=str(metadata["name"]),
        base=f"{base.get('namespace') or metadata['namespace']}/{base.get('name', '')}",
        phase=status.state or "Pending",
        message=_job_message(status),
        created_unix_s=unix_s(metadata.get("creationTimestamp")),
        trained_tokens=status.usage.trained_tokens if status.usage is not None else 0,
    )


def _job_message(status: FineTuneJobStatus) -> str:
    if status.failure is not None:
        return status.failure.message
    if status.queue is not None:
        place = f" (place {status.queue.position})" if status.queue.position else ""
        return f"{status.queue.reason}{place}"
    if status.progress is not None:
        loss = status.metrics.train_loss if status.metrics is not None else None
        return f"{status.progress.percent} % of the steps" + (f", loss {loss:.2f}" if loss is not None else "")
    return ""


def _why(adapter: AdapterRoute, loaded: int) -> str:
    """Why the adapter is where it is, in one or two sentences."""
    if adapter.spec.suspend:
        return "It is suspended: no request is served."
    if adapter.failure is not None and not adapter.ready:
        return adapter.failure.message
    if not adapter.ready:
        return adapter.message or "It is not ready yet."
    if not loaded:
        return "It is on no device: the next request loads it."
    wanted = adapter.preferred_replicas
    spread = f"Its requests are shared by {wanted} replicas." if wanted > 1 else "Its requests go to one replica."
    pinned = bool(adapter.spec.min_replicas)
    return f"{spread} It stays loaded, since minReplicas asks for it." if pinned else spread


def _permitted(name: str, scope: Scope, projects_of: Mapping[str, frozenset[str] | None]) -> bool:
    if scope.owner:
        return True
    kind, _, rest = name.partition("/")
    if kind == "key":
        if scope.keys is not None:
            return rest in scope.keys
        projects = projects_of.get(rest)
        return projects is not None and scope.projects is not None and projects <= scope.projects
    if scope.keys is not None:
        return False
    if kind == "model" and scope.models is not None and rest not in scope.models:
        return False
    return scope.permits_project(rest.partition("/")[0])


def _limit(use: Use, names: Mapping[str, str], currency: str, resets_unix_s: int | None) -> LimitNow:
    kind, _, rest = use.scope.partition("/")
    meter, unit = _METERS[use.meter]
    subject = f"{kind} {names.get(rest, rest) if kind == 'key' else rest}"
    used, limit = Decimal(use.used), Decimal(use.limit)
    if use.meter is Meter.MONEY_PER_MONTH:
        used, limit, unit = used / BILLIONTHS, limit / BILLIONTHS, currency
    return LimitNow(subject, meter, used, limit, unit, resets_unix_s)
