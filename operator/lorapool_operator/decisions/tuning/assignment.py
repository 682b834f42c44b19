"""What a trainer is sent of a job, and when."""

from __future__ import annotations

from lorapool_api.protocol import SourceRef
from lorapool_api.tuning.finetunejob import TrainingData
from lorapool_api.tuning.finetunejob_status import InitialStatus
from lorapool_api.tuning.states import RunState
from lorapool_api.tuning.trainer_protocol import InitialAdapter, TrainerJob, resolved_lora, resolved_training
from lorapool_operator.decisions.tuning.turns import Turns
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.tuning import ObservedJob, ObservedTuning

RESEND_S = 6 * 3600.0
"""A job is sent again this often, since its access to the store expires; `STORE_ACCESS_S` of effects is longer."""


def assignment(tuning: ObservedTuning, observed: ObservedJob, turns: Turns, now: float) -> TrainerJob | None:
    """Returns the job if the trainer has to be sent it: it lacks it, or has it otherwise, or its access gets old."""
    job, base = observed.job, tuning.base
    current = tuning.trainer.current if tuning.trainer is not None else None
    report = tuning.report(job.meta.uid)
    if base is None or current is None or not current.ready or current.draining:
        return None
    if report.state.ended if report is not None else job.meta.uid not in turns.wanted:
        return None
    wanted = trainer_job(observed, base)
    if wanted is None:
        return None
    if turns.stops(job.meta.uid):
        wanted = wanted.model_copy(update={"run": RunState.PAUSED})
    sent = observed.sent
    known = sent is not None and sent.boot_id == current.boot_id and sent.job == wanted
    fresh = sent is not None and now < sent.at_unix_s + RESEND_S
    return None if report is not None and known and fresh else wanted


def trainer_job(observed: ObservedJob, base: BaseObject) -> TrainerJob | None:
    """Returns what a trainer is sent, but for access to the store; None until the initial adapter is in the status."""
    job, spec = observed.job, observed.job.spec
    initial, lora = None, resolved_lora(spec, base.spec)
    if spec.init_from is not None:
        pinned = job.status.initial
        if pinned is None:
            return None
        initial = InitialAdapter(source=SourceRef(uri=pinned.uri), digest=pinned.digest)
        lora = spec.lora  # the adapter decides what it leaves open
    usage = job.status.usage
    return TrainerJob(
        display=str(job.key),
        created_unix_s=job.meta.created_unix_s,
        run=spec.run,
        priority=spec.priority,
        workspace=f"store://{job.meta.namespace}/jobs/{job.meta.uid}",
        output=f"store://{job.meta.namespace}/adapters/{job.meta.uid}",
        method=spec.method,
        init_from=initial,
        data=_pinned(observed),
        lora=lora,
        training=resolved_training(spec, base.spec),
        checkpoints=spec.checkpoints,
        crashes=usage.crashes if usage is not None else 0,
    )


def initial_to_pin(tuning: ObservedTuning, observed: ObservedJob, turns: Turns) -> InitialStatus | None:
    """Returns the adapter that a job is about to continue, which the status has before a trainer does."""
    job, found = observed.job, observed.initial
    current = tuning.trainer.current if tuning.trainer is not None else None
    if job.status.initial is not None or job.spec.init_from is None or found is None or found.status.digest is None:
        return None
    if current is None or not current.ready or job.meta.uid not in turns.wanted:
        return None
    return InitialStatus(uri=found.spec.source.uri, digest=found.status.digest)


def _pinned(observed: ObservedJob) -> TrainingData:
    """Returns the data with the digests of the files that were checked, also before the status has them."""
    data, known, finding = observed.job.spec.data, observed.job.status.data, observed.finding
    digest = known.digest if known is not None else finding and finding.digest
    validation_digest = known.validation_digest if known is not None else finding and finding.validation_digest
    training, validation = data.training, data.validation
    if training.digest is None:
        training = training.model_copy(update={"digest": digest})
    if validation is not None and validation.digest is None:
        validation = validation.model_copy(update={"digest": validation_digest})
    return data.model_copy(update={"training": training, "validation": validation})
