"""Applies a plan: turns its actions into calls. It decides nothing.

A call that fails raises, and the key is due again after its back-off. The response to a status write enters the cache
at once, so that the next plan observes it.
"""

from __future__ import annotations

import logging
import time

from lorapool_api.common import ANNOTATION_DELETION_COST, Reason
from lorapool_operator.decisions.plan import AdapterPlan, BasePlan, KubeEvent, Unregister
from lorapool_operator.decisions.plan_unreadable import UnreadablePlan
from lorapool_operator.decisions.pods import Manifest
from lorapool_operator.decisions.runtime_tls import TLS_SECRET
from lorapool_operator.effects.certificates import Certificates
from lorapool_operator.effects.cluster import (
    ClusterError,
    ForeignObjectError,
    ObjectConflictError,
    ObjectNotFoundError,
    PlanTarget,
    Subject,
)
from lorapool_operator.effects.inspections import InspectionTracker
from lorapool_operator.effects.runtime_calls import RuntimeCallError
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.world.cluster_cache import (
    LEADER_WORKER_SET,
    AdapterObject,
    BaseObject,
    ClusterCache,
    Key,
    ObjectKind,
    UnreadableObject,
)
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.observed import BaseMemory, ChildProblem, ObservedAdapter

log = logging.getLogger(__name__)

REFUSALS = (400, 403, 422)
"""Invalid, forbidden (rights, quota, admission policy), unprocessable: nothing changes until a person acts."""
MALFORMED = ("failed to convert new object", "failed to create typed patch object")
"""The API server answers 500 to a value of a wrong form, such as the quantity 16GB."""

NO_GROUPS = (
    "The runtime profile has several nodes, and the cluster does not serve LeaderWorkerSets: install LeaderWorkerSet "
    "0.7 or later (https://lws.sigs.k8s.io/docs/installation), or use a profile with one node."
)


class Applier:
    def __init__(
        self,
        cluster: PlanTarget,
        cache: ClusterCache,
        intake: Intake,
        runtimes: RuntimeTracker,
        inspections: InspectionTracker,
        certificates: Certificates | None = None,
    ) -> None:
        """`certificates`: None where runtimes serve without TLS."""
        self._cluster = cluster
        self._cache = cache
        self._intake = intake
        self._runtimes = runtimes
        self._inspections = inspections
        self._certificates = certificates

    async def adapter(self, observed: ObservedAdapter, plan: AdapterPlan) -> None:
        """Applies an adapter's plan; the status first, as others act on it. Raises ClusterError, RuntimeCallError."""
        adapter = observed.adapter
        if plan.inspect is not None:
            self._inspections.start(plan.inspect)
        if plan.status is not None:
            try:
                raw = await self._cluster.patch_status(adapter, plan.status.dump())
            except ObjectNotFoundError:
                return
            self._intake.wrote_adapter(raw)
            self._runtimes.forget_lost(adapter.meta.uid, observed.lost_usage)
        failures: list[RuntimeCallError] = []
        for item in plan.registers:
            try:
                await self._runtimes.register(item.pod_uid, item.adapter, item.descriptor)
            except RuntimeCallError as error:
                failures.append(error)
        failures += await self._unregister(plan.unregisters)
        await self._post(_subject(ObjectKind.ADAPTER, adapter), plan.events)
        if failures:
            raise failures[0]

    async def base(self, base: BaseObject, plan: BasePlan, memory: BaseMemory) -> bool:
        """Applies a base's plan. Returns True if that requires another plan. Raises ClusterError, RuntimeCallError."""
        memory.scale = plan.memory
        if plan.inspect is not None:
            self._inspections.start(plan.inspect)
        if plan.scale_to is not None:
            for pod, cost in plan.deletion_costs:
                await self._cluster.annotate_pod(base.meta.namespace, pod, {ANNOTATION_DELETION_COST: cost})
            # first and alone: if a gateway wakes the base at this moment, it wins, and no pod has been stopped yet
            await self._cluster.scale(base, plan.scale_to)
            await self._post(_subject(ObjectKind.BASE, base), plan.events)
            return False
        for item in plan.remove:
            await self._cluster.delete(item.kind, item.meta.namespace, item.meta.name, uid=item.meta.uid)
        refused = await self._certify(base)
        if plan.children:
            refused = refused or await self._apply_children(plan)
            if memory.children_applied(plan.children_hash, refused, time.time()):
                return True  # the status was decided without knowing this
        if plan.read_refusals and await self._read_refusals(base, plan.read_refusals, memory):
            return True
        if plan.status is not None:
            try:
                raw = await self._cluster.patch_status(base, plan.status.dump())
            except ObjectNotFoundError:
                return False
            self._intake.wrote_base(raw)
            base = self._cache.bases.get(base.meta.namespace, base.meta.name) or base
        failures = await self._unregister(plan.unregisters)
        await self._post(_subject(ObjectKind.BASE, base), plan.events)
        if failures:
            raise failures[0]
        return False

    async def _read_refusals(self, base: BaseObject, sets: tuple[str, ...], memory: BaseMemory) -> bool:
        """Reads why pods of groups are refused. Returns True if that changed."""
        before, found = memory.pods_refused, ""
        for uid in sets:
            found = found or await self._cluster.refused_pods(base.meta.namespace, uid)
        memory.pods_refused, memory.refusals_read_unix_s = found, time.time()
        return found != before

    async def unreadable(self, key: Key, item: UnreadableObject, plan: UnreadablePlan) -> None:
        """Reports an object that cannot be parsed. Raises ClusterError."""
        meta = item.raw["metadata"]
        try:
            await self._cluster.patch_raw_status(key, str(meta["resourceVersion"]), plan.status)
        except ObjectNotFoundError:
            return
        subject = Subject(key.kind.value, key.namespace, key.name, meta["uid"], str(meta["resourceVersion"]))
        await self._post(subject, (plan.event,))

    async def _certify(self, base: BaseObject) -> ChildProblem | None:
        """Has a certificate for the base's pods, also while they run without any change. Returns why one is refused."""
        if self._certificates is None:
            return None
        try:
            await self._certificates.ensure(base)
        except ClusterError as error:
            refused = refusal({"kind": "Secret", "metadata": {"name": TLS_SECRET}}, error)
            if refused is None:
                raise
            return refused
        return None

    async def _apply_children(self, plan: BasePlan) -> ChildProblem | None:
        """Applies all children. Returns why the API server refused one; a transient error is raised."""
        problem: ChildProblem | None = None
        for child in plan.children:
            try:
                applied = await self._cluster.apply_child(child)
                if child["kind"] == LEADER_WORKER_SET:
                    self._intake.leader_worker_set(applied)  # its API may be too new in the cluster for a watch
            except ClusterError as error:
                refused = refusal(child, error)
                if refused is None:
                    raise
                problem = problem or refused
        return problem

    async def _unregister(self, items: tuple[Unregister, ...]) -> list[RuntimeCallError]:
        failures: list[RuntimeCallError] = []
        for item in items:
            if item.verify and await self._exists(item):
                continue
            try:
                answer = await self._runtimes.unregister(item.pod_uid, item.adapter)
            except RuntimeCallError as error:
                failures.append(error)
                continue
            if answer is not None:
                log.info(
                    "adapter unregistered from a runtime",
                    extra={"adapter": item.display, "replica": item.pod, "freed_bytes": answer.freed_device_bytes},
                )
        return failures

    async def _exists(self, item: Unregister) -> bool:
        """True if the object of a reported adapter exists but is missing in the cache, or if that cannot be read."""
        namespace, _, name = item.display.partition("/")
        try:
            raw = await self._cluster.get(ObjectKind.ADAPTER, namespace, name)
        except ObjectNotFoundError:
            return False
        except ClusterError as error:  # the rest of the plan does not depend on it
            log.info("reported adapter cannot be looked up", extra={"adapter": item.display, "error": str(error)})
            return True
        return bool(raw["metadata"]["uid"] == item.adapter.uid)

    async def _post(self, subject: Subject, events: tuple[KubeEvent, ...]) -> None:
        """Posts events. One that conflicts is logged and not tried again."""
        for event in events:
            try:
                await self._cluster.post_event(subject, event, time.time())
            except ObjectConflictError as error:
                log.warning(
                    "event not posted", extra={"object": f"{subject.namespace}/{subject.name}", "error": str(error)}
                )


def refusal(child: Manifest, error: ClusterError) -> ChildProblem | None:
    """Returns what a refused apply means for the base; None for an error that a retry may cure by itself."""
    if isinstance(error, ForeignObjectError):
        return ChildProblem(Reason.NAME_CONFLICT, str(error))
    if isinstance(error, ObjectNotFoundError) and child["kind"] == LEADER_WORKER_SET:
        return ChildProblem(Reason.LEADER_WORKER_SET_MISSING, NO_GROUPS)
    refused = error.status in REFUSALS or (error.status == 500 and error.detail.startswith(MALFORMED))
    if not refused:
        return None
    if "exceeded quota" in error.detail:
        reason = Reason.QUOTA_EXCEEDED
    else:
        reason = Reason.APPLY_REFUSED if error.status == 403 else Reason.INVALID_PROFILE
    return ChildProblem(reason, f"{child['kind']} {child['metadata']['name']}: {error.detail}")


def _subject(kind: ObjectKind, item: BaseObject | AdapterObject) -> Subject:
    return Subject(kind.value, item.meta.namespace, item.meta.name, item.meta.uid, item.meta.resource_version)
