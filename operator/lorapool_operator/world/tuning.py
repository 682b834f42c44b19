"""What is known of FineTuneJobs and of the trainers of bases: objects, their cache, and the values given to a plan.

All jobs of one base are planned together, since they share its trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorapool_api.common import GROUP, LABEL_BASE
from lorapool_api.trust.ownership import controller_uid
from lorapool_api.tuning.finetunejob import FineTuneJobSpec
from lorapool_api.tuning.finetunejob_status import FineTuneJobStatus
from lorapool_api.tuning.states import JobFailure, JobState
from lorapool_api.tuning.trainer_protocol import JobReport, TrainerJob, TrainerSnapshot
from lorapool_operator.clock import unix
from lorapool_operator.world.cluster_cache import (
    AdapterObject,
    BaseObject,
    ClusterCache,
    Key,
    KindCache,
    Meta,
    ObjectKind,
    PodObject,
    UnreadableObject,
    parse_part,
)
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile

LABEL_TRAINER = f"{GROUP}/trainer"
"""On a trainer's Job and pod, in place of the label that runtime pods have: the uid of their BaseModel."""


@dataclass(frozen=True, slots=True)
class TuningObject:
    """A FineTuneJob."""

    meta: Meta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus
    finalizers: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return Key(ObjectKind.TUNING, self.meta.namespace, self.meta.name)

    @property
    def base_key(self) -> Key:
        ref = self.spec.base_model_ref
        return Key(ObjectKind.BASE, ref.namespace or self.meta.namespace, ref.name)

    @property
    def ended(self) -> bool:
        return self.state is not None and self.state.ended

    @property
    def state(self) -> JobState | None:
        """The state that its status has; None for none, or one of a newer version."""
        known = self.status.state in tuple(JobState)
        return JobState(str(self.status.state)) if known else None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> TuningObject:
        """Parses the API server's JSON. Raises UnreadableError or KeyError."""
        return cls(
            Meta.parse(raw["metadata"]),
            parse_part(FineTuneJobSpec, raw, "spec"),
            parse_part(FineTuneJobStatus, raw, "status"),
            tuple(raw["metadata"].get("finalizers") or ()),
        )


@dataclass(frozen=True, slots=True)
class SessionObject:
    """A batch/v1 Job that is a trainer of a base."""

    meta: Meta
    base: Key
    owner_uid: str
    """Uid of the BaseModel that owns it; empty for none."""
    suspended: bool = False
    """It has no pod until its suspension ends."""
    complete: bool = False
    """Its trainer ended by itself."""
    failure: str = ""
    """Why Kubernetes gave it up; empty while it has not."""
    ended_unix_s: float = 0.0

    @property
    def ended(self) -> bool:
        return self.complete or bool(self.failure)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> SessionObject:
        meta = Meta.parse(raw["metadata"])
        base = (raw["metadata"].get("labels") or {}).get(LABEL_BASE, "")
        conditions = {
            item["type"]: item
            for item in (raw.get("status") or {}).get("conditions") or ()
            if item.get("status") == "True"
        }
        ended = conditions.get("Failed") or conditions.get("Complete") or {}
        failed = conditions.get("Failed")
        return cls(
            meta=meta,
            base=Key(ObjectKind.BASE, meta.namespace, base),
            owner_uid=controller_uid(raw["metadata"], ObjectKind.BASE),
            suspended=bool((raw.get("spec") or {}).get("suspend")),
            complete="Complete" in conditions,
            failure=f"{failed.get('reason') or 'Failed'}: {failed.get('message') or ''}" if failed else "",
            ended_unix_s=unix(ended.get("lastTransitionTime")) or 0.0,
        )


class TuningCache:
    """The FineTuneJobs and the trainers' Jobs that exist. The pods are those of the operator's other cache."""

    def __init__(self) -> None:
        self.jobs: KindCache[TuningObject] = KindCache()
        self.sessions: KindCache[SessionObject] = KindCache()
        self.unreadable: dict[Key, UnreadableObject] = {}
        """Jobs whose newest version cannot be parsed. Nothing is planned for them."""

    def jobs_of(self, base: Key) -> list[TuningObject]:
        """Returns the readable jobs that name this base, permitted or not, the oldest first."""
        found = (job for job in self.jobs if job.base_key == base and job.key not in self.unreadable)
        return sorted(found, key=lambda job: (job.meta.created_unix_s, job.meta.uid))

    def session_of(self, base: Key) -> SessionObject | None:
        """Returns the trainer's Job of a base, of this or of a deleted one of the same name; never a Job of others."""
        return next((item for item in self.sessions if item.base == base and item.owner_uid), None)

    def trainer_pods(self, cluster: ClusterCache) -> list[PodObject]:
        """Returns the pods whose owners are a trainer's Job, and a BaseModel, of their own namespace, that exists.

        Each has the uid of that BaseModel, as a runtime's pod has, so that it is spoken to with the same tokens.
        """
        sessions = {(item.meta.namespace, item.meta.uid): item for item in self.sessions}
        found = ((pod, sessions.get((pod.meta.namespace, pod.job_uid))) for pod in cluster.pods)
        return [
            replace(pod, base_uid=session.owner_uid)
            for pod, session in found
            if session is not None and pod.base == session.base and _exists(session, cluster)
        ]


def _exists(session: SessionObject, cluster: ClusterCache) -> bool:
    base = cluster.bases.get(session.base.namespace, session.base.name)
    return base is not None and base.meta.uid == session.owner_uid


# --- what a plan is made of --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainerView:
    """The pod of a trainer, and what the trainer itself reported."""

    pod: PodObject
    snapshot: TrainerSnapshot | None
    """The latest one, however old."""
    fresh: bool
    """True if the latest poll succeeded, or polls have failed only for a moment."""
    skew_s: float = 0.0
    """The operator's clock minus the trainer's."""

    @property
    def current(self) -> TrainerSnapshot | None:
        """The snapshot if it describes the present."""
        return self.snapshot if self.fresh and not self.pod.terminating else None


@dataclass(frozen=True, slots=True)
class DataFinding:
    """The result of a check of a data set."""

    examples: int = 0
    validation_examples: int = 0
    digest: str | None = None
    """sha256 of the training file."""
    validation_digest: str | None = None
    failure: JobFailure | None = None
    """Why the data set cannot be used; None if it can."""
    message: str = ""
    line: int | None = None
    at_unix_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sent:
    """What a trainer's process was last sent of a job."""

    boot_id: str
    job: TrainerJob
    at_unix_s: float


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """A FineTuneJob and everything that is known of it."""

    job: TuningObject
    finding: DataFinding | None = None
    checking: bool = False
    """A check of its data is under way."""
    sent: Sent | None = None
    written_unix_s: float = 0.0
    """When this process wrote its status last; 0 for never."""
    initial: AdapterObject | None = None
    """The adapter that spec.initFrom names."""
    result: AdapterObject | None = None
    """The LoraAdapter that has the name of the result."""
    publish_problem: str = ""
    """Why the API server refused its LoraAdapter; empty if it did not."""
    publish_failed_unix_s: float = 0.0
    deleted_data: bool = False
    """Its files were deleted, so that the object may go."""


@dataclass(frozen=True, slots=True)
class ObservedTuning:
    """A base as a place to train, and all its jobs."""

    key: Key
    base: BaseObject | None
    profile: RuntimeProfile | None
    image: RuntimeImage
    store: bool = True
    """There is a store for data and results."""
    base_may_exist: bool = False
    """The base is missing only because its namespace was never listed."""
    jobs: tuple[ObservedJob, ...] = ()
    session: SessionObject | None = None
    trainer: TrainerView | None = None
    active_elsewhere: Mapping[str, int] = field(default_factory=dict)
    """Jobs of other bases that train, by namespace."""
    older_unfinished: Mapping[str, int] = field(default_factory=dict)
    """By uid of a job: the unfinished jobs of its namespace, on any base, that are older."""
    month_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens that each namespace trained in this calendar month, where there is a limit."""
    tls: bool = False
    """New pods serve TLS."""

    def report(self, uid: str) -> JobReport | None:
        """Returns what the trainer says now of a job."""
        current = self.trainer.current if self.trainer is not None else None
        return current.job(uid) if current is not None else None
