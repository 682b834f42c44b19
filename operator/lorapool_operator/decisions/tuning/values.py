"""The values that plans of fine-tuning are made of. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.tuning.finetunejob_status import FineTuneJobStatus
from lorapool_api.tuning.states import JobFailure, JobReason
from lorapool_api.tuning.trainer_protocol import TrainerJob
from lorapool_operator.decisions.plan import KubeEvent
from lorapool_operator.decisions.pods import Manifest
from lorapool_operator.world.tuning import ObservedJob


@dataclass(frozen=True, slots=True)
class TuningLimits:
    """The part of the operator's settings that these plans depend on; each is documented there."""

    active_jobs: int = 8
    unfinished_jobs: int = 64
    month_tokens: int | None = None
    """None: no limit."""
    status_interval_s: float = 10.0
    retry_s: float = 15.0
    """After a first transient failure; the wait doubles with each further one, up to `retry_max_s`."""
    retry_max_s: float = 600.0
    priority_class: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job does not go on."""

    reason: JobFailure
    message: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a job is not trained now, although nothing about it failed."""

    reason: JobReason
    message: str
    position: int | None = None
    failure: Failure | None = None
    """The transient failure that it recovers from."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """The actions that one FineTuneJob needs now."""

    observed: ObservedJob
    finalizers: tuple[str, ...] | None = None
    """The finalizers to be written; None if they are right."""
    check_data: bool = False
    put: TrainerJob | None = None
    """To be sent to the trainer, with access to the store added."""
    unregister: bool = False
    """To be removed from the trainer."""
    promote: Manifest | None = None
    """The LoraAdapter to be created."""
    delete_data: bool = False
    delete_object: bool = False
    status: FineTuneJobStatus | None = None
    """The status to be written; None if it is unchanged."""
    events: tuple[KubeEvent, ...] = ()
    requeue_at: float | None = None


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """The actions that the jobs of a base and its trainer need now."""

    start: tuple[Manifest, ...] = ()
    """The trainer's NetworkPolicy, if there is one, and its Job, to be created in this order."""
    stop_uid: str | None = None
    """Uid of the trainer's Job to be deleted."""
    jobs: tuple[JobPlan, ...] = ()
    requeue_at: float | None = None
