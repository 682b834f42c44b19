"""FineTuneJobs of a base and its trainer, in one literal: what the tests of their plans state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from base_world import IMAGE, KEY, NOW, base, meta
from fakes_operator import digest

from lorapool_api.common import Condition
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus
from lorapool_api.tuning.finetunejob import FINALIZER, FineTuneJobSpec
from lorapool_api.tuning.finetunejob_status import FineTuneJobStatus, MetricsStatus, ProgressStatus
from lorapool_api.tuning.states import JobState
from lorapool_api.tuning.trainer_protocol import JobReport, JobResult, TrainerBase, TrainerSnapshot
from lorapool_operator.decisions.tuning.plan_tuning import plan_tuning
from lorapool_operator.decisions.tuning.values import JobPlan, TuningLimits, TuningPlan
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, PodObject
from lorapool_operator.world.profiles import RuntimeProfile
from lorapool_operator.world.tuning import (
    DataFinding,
    ObservedJob,
    ObservedTuning,
    SessionObject,
    TrainerView,
    TuningObject,
)

LIMITS = TuningLimits()
VALID = DataFinding(examples=20, digest=digest("data"), at_unix_s=NOW)
PROFILE = RuntimeProfile()


def tuned(**spec: Any) -> BaseObject:
    """A base that may be tuned."""
    return base(**{"fineTuning": {"enabled": True}, **spec})


def job(name: str = "j", *, status: dict[str, Any] | None = None, created: float = 0.0, **spec: Any) -> TuningObject:
    space = "team"
    data = {"training": {"uri": f"store://{space}/files/{name}"}, "validationFraction": "0.1"}
    made = FineTuneJobSpec.model_validate({"baseModelRef": {"name": "tiny"}, "data": data, **spec})
    own = meta(name, f"{name}-uid", created_unix_s=NOW + created)
    return TuningObject(own, made, FineTuneJobStatus.model_validate(status or {}), (FINALIZER,))


def observed(name: str = "j", *, finding: DataFinding | None = VALID, **spec: Any) -> ObservedJob:
    """A job whose data was checked."""
    return ObservedJob(job(name, **spec), finding=finding)


def trainer_pod(name: str = "trainer", *, ready: bool = True, **more: Any) -> PodObject:
    known = (meta(name, f"{name}-uid"), KEY, "", "10.0.0.2", 8000, ready, False, "")
    return replace(PodObject(*known), **{"job_uid": "session-uid", **more})


def session(**more: Any) -> SessionObject:
    return SessionObject(meta("tiny-trainer", "session-uid"), KEY, **{"owner_uid": "base-uid", **more})


def report(name: str = "j", state: JobState = JobState.TRAINING, **more: Any) -> JobReport:
    known = {"uid": f"{name}-uid", "display": f"team/{name}", "run": "Run", "priority": 50, "since_unix_s": NOW}
    return JobReport.model_validate({**known, "state": state, **more})


def trained(name: str = "j", *, valid: float | None = 1.0, base_valid: float | None = 2.0) -> JobReport:
    """The report of a job that was trained and written."""
    result = JobResult(uri=f"store://team/adapters/{name}-uid", digest=digest(name), size_bytes=9)
    metrics = MetricsStatus(train_loss=0.5, valid_loss=valid, base_valid_loss=base_valid)
    progress = ProgressStatus(step=10, total_steps=10)
    return report(name, JobState.SUCCEEDED, result=result, metrics=metrics, progress=progress)


def trainer(*reports: JobReport, fresh: bool = True, pod: PodObject | None = None, **more: Any) -> TrainerView:
    snapshot = TrainerSnapshot.model_validate(
        {
            "seq": 1, "boot_id": "boot", "started_unix_s": NOW, "now_unix_s": NOW, "trainer_version": "0.1.0",
            "ready": True, "base": TrainerBase(digest=digest("base"), dtype="float32", device="cpu"),
            "jobs": list(reports), **more,
        }
    )  # fmt: skip
    return TrainerView(pod or trainer_pod(), snapshot, fresh)


def adapter(name: str = "j", *, status: dict[str, Any] | None = None, **source: Any) -> AdapterObject:
    """The LoraAdapter that a job's result becomes."""
    known = {"uri": f"store://team/adapters/{name}-uid", "digest": digest(name)}
    spec = {"baseModelRef": {"name": "tiny"}, "source": {**known, **source}, "alias": f"ft:tiny:team::{name}"}
    made = LoraAdapterSpec.model_validate(spec)
    return AdapterObject(meta(name, f"{name}-adapter-uid"), made, LoraAdapterStatus.model_validate(status or {}))


def plan(*jobs: ObservedJob, now: float = NOW, limits: TuningLimits = LIMITS, **world: Any) -> TuningPlan:
    known = {"base": tuned(), "profile": PROFILE, "image": IMAGE, "jobs": jobs}
    return plan_tuning(ObservedTuning(KEY, **{**known, **world}), now, limits)


def only(found: TuningPlan) -> JobPlan:
    """The plan of the only job."""
    (one,) = found.jobs
    return one


def condition(found: JobPlan, kind: str) -> tuple[str, str]:
    """(status, reason) of a condition of the status to be written."""
    assert found.status is not None
    item: Condition = next(entry for entry in found.status.conditions if entry.type == kind)
    return item.status, item.reason


def after(found: JobPlan, **more: Any) -> ObservedJob:
    """The job once its planned status is written."""
    assert found.status is not None
    return replace(found.observed, job=replace(found.observed.job, status=found.status), **more)
