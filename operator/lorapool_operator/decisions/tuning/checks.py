"""Whether a job may train on its base, from what is known without a pod."""

from __future__ import annotations

from collections.abc import Iterable

from lorapool_api.base_modules import BaseModules, expand
from lorapool_api.tuning.finetunejob import ALL_LINEAR
from lorapool_api.tuning.finetunejob_status import InitialStatus
from lorapool_api.tuning.states import JobFailure, JobReason
from lorapool_api.tuning.trainer_protocol import resolved_lora
from lorapool_operator.decisions.tuning.values import Failure, Waiting
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.tuning import ObservedJob, ObservedTuning, TuningObject


def waits_for_base(tuning: ObservedTuning, job: TuningObject) -> Waiting | None:
    """Returns what the job waits for before its base can train it; None if it can."""
    base, guest = tuning.base, job.base_key.namespace != job.meta.namespace
    if base is None or base.meta.deleting or not base.admits(job.meta.namespace):
        if guest:  # the same sentence, so that no guest learns which bases exist
            return Waiting(
                JobReason.NOT_PERMITTED,
                f"BaseModel {job.base_key} does not exist, or its spec.access.namespaces does not list "
                f"{job.meta.namespace}: ask its owner to add it.",
            )
        return Waiting(
            JobReason.BASE_NOT_FOUND, f"BaseModel {job.base_key} does not exist: create it, or delete this job."
        )
    if not base.spec.fine_tuning.enabled:
        return Waiting(
            JobReason.TUNING_DISABLED,
            f"BaseModel {job.base_key} does not allow fine-tuning: its owner sets spec.fineTuning.enabled to true.",
        )
    if tuning.profile is None:
        name = base.spec.fine_tuning.profile or base.spec.runtime_profile
        return Waiting(
            JobReason.PROFILE_NOT_USABLE,
            f"The chart's runtimeProfiles have no profile {name} of the engine torch for namespace "
            f"{base.meta.namespace}: name one in spec.fineTuning.profile of the BaseModel.",
        )
    if not tuning.store:
        return Waiting(JobReason.NO_STORE, "The operator knows no store: set the chart's value store.enabled.")
    return None


def refusal(observed: ObservedJob, base: BaseObject) -> Failure | None:
    """Returns why the job can never train on this base as it is; None if nothing is known to be wrong."""
    job = observed.job
    return (
        _foreign_data(job)
        or _initial(observed, base)
        or _rank(observed, base)
        or _context(job, base)
        or _targets(job.spec.lora.target_modules, base.status.modules)
    )


def _foreign_data(job: TuningObject) -> Failure | None:
    """Refuses files of another namespace with the words for files that do not exist."""
    files = (job.spec.data.training, job.spec.data.validation)
    for file in files:
        if file is not None and file.uri.removeprefix("store://").partition("/")[0] != job.meta.namespace:
            message = f"{file.uri} does not exist in namespace {job.meta.namespace}: upload it there, or name another."
            return Failure(JobFailure.INVALID_DATASET, message)
    return None


def _initial(observed: ObservedJob, base: BaseObject) -> Failure | None:
    wanted = observed.job.spec.init_from
    if wanted is None:
        return None
    if observed.job.status.initial is not None:
        return _initial_changed(observed, observed.job.status.initial)
    if observed.initial is None:
        message = f"spec.initFrom names no LoraAdapter of this namespace: {wanted.name}. Create it first."
        return Failure(JobFailure.INCOMPATIBLE, message)
    if observed.initial.base_key != base.key:
        message = f"LoraAdapter {wanted.name} of spec.initFrom is not one of BaseModel {base.key}: name that base."
        return Failure(JobFailure.INCOMPATIBLE, message)
    if not observed.initial.spec.source.uri.startswith("store://"):
        message = f"LoraAdapter {wanted.name} of spec.initFrom is not from the store: name the result of another job."
        return Failure(JobFailure.INCOMPATIBLE, message)
    given, own = observed.job.spec.lora.rank, observed.initial.status.rank
    if given is not None and own is not None and given != own:
        message = (
            f"spec.lora.rank is {given}, but the adapter of spec.initFrom has {own}; leave spec.lora.rank out, or "
            "train a new adapter."
        )
        return Failure(JobFailure.INCOMPATIBLE, message)
    return None


def _initial_changed(observed: ObservedJob, pinned: InitialStatus) -> Failure | None:
    """Refuses to continue a job whose adapter has other files by now. The LoraAdapter itself may change or go."""
    found = observed.initial
    if found is None or found.spec.source.uri != pinned.uri or found.status.digest in (None, pinned.digest):
        return None
    message = (
        f"The job began with LoraAdapter {found.meta.name} of spec.initFrom as {pinned.digest}, and its files are "
        f"{found.status.digest} now: create another job to continue these."
    )
    return Failure(JobFailure.INCOMPATIBLE, message)


def waits_for_initial(observed: ObservedJob) -> Waiting | None:
    """Returns what the job waits for while the adapter that it continues is not checked."""
    wanted = observed.job.spec.init_from
    if wanted is None or observed.job.status.initial is not None:
        return None
    if observed.initial is None or observed.initial.status.digest is not None:
        return None
    why = observed.initial.status.failure
    message = f"LoraAdapter {wanted.name} of spec.initFrom is not checked yet. {why.message if why else ''}".strip()
    return Waiting(JobReason.PENDING, message)


def rank_of(observed: ObservedJob, base: BaseObject) -> int:
    """Returns the rank that the job is trained with."""
    initial = observed.initial.status.rank if observed.initial is not None else None
    return initial or resolved_lora(observed.job.spec, base.spec).rank or 1


def _rank(observed: ObservedJob, base: BaseObject) -> Failure | None:
    limit = base.spec.fine_tuning.max_rank or base.spec.lora.max_rank
    rank = rank_of(observed, base)
    if rank <= limit:
        return None
    message = f"Rank {rank} is above {limit}, which BaseModel {base.key} allows: lower spec.lora.rank in another job."
    return Failure(JobFailure.INCOMPATIBLE, message)


def _context(job: TuningObject, base: BaseObject) -> Failure | None:
    tokens, limit = job.spec.training.max_tokens, base.spec.max_model_len
    if tokens is None or tokens <= limit:
        return None
    message = f"training.maxTokens {tokens} is above {limit}, spec.maxModelLen of BaseModel {base.key}: lower it."
    return Failure(JobFailure.INCOMPATIBLE, message)


def _targets(targets: Iterable[str], modules: BaseModules | None) -> Failure | None:
    """Refuses names that no module of the base has. Nothing is refused before a runtime reported the modules."""
    named = [target for target in targets if target != ALL_LINEAR]
    if modules is None or not named:
        return None
    names = {name for module in expand(modules) for name in (module.name, *module.aliases, *module.parts)}
    absent = [target for target in named if not any(_matches(name, target) for name in names)]
    if not absent:
        return None
    known = sorted({name.rpartition(".")[2] for name in names})
    message = f"The base has no module {', '.join(absent)} (lora.targetModules). It has {', '.join(known)[:400]}."
    return Failure(JobFailure.INCOMPATIBLE, message)


def _matches(name: str, target: str) -> bool:
    """As peft compares them: the whole name, or its last parts."""
    return name == target or name.endswith(f".{target}")
