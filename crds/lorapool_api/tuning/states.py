"""States, conditions and reasons of a FineTuneJob. What each means is explained in `tuning.reasons`."""

from __future__ import annotations

import re
from enum import StrEnum


class JobState(StrEnum):
    """Where a FineTuneJob is, for people, the STATE column and clients."""

    VALIDATING = "Validating"
    """The data set is being checked."""
    QUEUED = "Queued"
    """It waits: for its base, for a trainer, for memory or for its turn."""
    TRAINING = "Training"
    PAUSED = "Paused"
    EVALUATING = "Evaluating"
    """The validation loss of the trained adapter is being computed."""
    PUBLISHING = "Publishing"
    """The adapter's files are being written to where they are served from."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"

    @property
    def ended(self) -> bool:
        """Whether the job never changes any more."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class RunState(StrEnum):
    """What the owner of a job asks for."""

    RUN = "Run"
    PAUSED = "Paused"
    CANCELLED = "Cancelled"
    """Final."""


class JobCondition(StrEnum):
    """Condition types of a FineTuneJob."""

    DATA_VALID = "DataValid"
    ADMITTED = "Admitted"
    PROGRESSING = "Progressing"
    EVALUATED = "Evaluated"
    PROMOTED = "Promoted"
    COMPLETED = "Completed"


class JobReason(StrEnum):
    """Reasons of the conditions of a FineTuneJob that are no failures; failures have a `JobFailure`."""

    PENDING = "Pending"
    VALID = "Valid"
    BASE_NOT_FOUND = "BaseNotFound"
    NOT_PERMITTED = "NotPermitted"
    TUNING_DISABLED = "TuningDisabled"
    PROFILE_NOT_USABLE = "ProfileNotUsable"
    NO_STORE = "NoStore"
    NAMESPACE_LIMIT = "NamespaceLimit"
    """The namespace trains as many jobs as it may; the job waits for one of them to end."""
    TOKEN_QUOTA = "TokenQuota"
    """The namespace trained as many tokens as it may in a calendar month; the job waits for the next one."""
    TRAINER_STARTING = "TrainerStarting"
    AWAITING_RELEASE = "AwaitingRelease"
    """The trainer's Job is suspended: by the profile, or by Kueue until it admits it."""
    WAITING_FOR_TURN = "WaitingForTurn"
    RETRYING = "Retrying"
    """It failed for a transient reason, and waits for the next attempt."""
    UNREADABLE = "Unreadable"
    """The object has a field of a newer version."""
    NO_MEMORY = "NoMemory"
    """The trainer has no memory for one more job; the message has the figures."""
    ADMITTED = "Admitted"
    TRAINING = "Training"
    PAUSED = "Paused"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    EVALUATED = "Evaluated"
    NOT_EVALUATED = "NotEvaluated"
    """The job has no validation examples."""
    PROMOTED = "Promoted"
    PROMOTION_OFF = "PromotionOff"
    ENDED = "Ended"
    SUCCEEDED = "Succeeded"
    CANCELLED = "Cancelled"


class JobFailure(StrEnum):
    """Why a job does not go on. Each is either transient, and tried again, or terminal."""

    # terminal: the job has ended
    INVALID_DATASET = "InvalidDataset"
    TOO_FEW_EXAMPLES = "TooFewExamples"
    EXAMPLE_TOO_LONG = "ExampleTooLong"
    TEMPLATE_UNSUPPORTED = "TemplateUnsupported"
    INCOMPATIBLE = "Incompatible"
    QUOTA_EXCEEDED = "QuotaExceeded"
    DIVERGED = "Diverged"
    GATE_NOT_MET = "GateNotMet"
    POISONED = "Poisoned"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    BASE_CHANGED = "BaseChanged"
    NAME_TAKEN = "NameTaken"
    # transient
    SOURCE_UNAVAILABLE = "SourceUnavailable"
    NO_CAPACITY = "NoCapacity"
    TRAINER_LOST = "TrainerLost"
    PREEMPTED = "Preempted"
    PUBLISH_FAILED = "PublishFailed"

    @property
    def transient(self) -> bool:
        """Whether the job goes on by itself once the cause is gone."""
        return self in _TRANSIENT

    @property
    def code(self) -> str:
        """The `code` in OpenAI's error format."""
        return _CODES.get(self) or re.sub(r"(?<!^)(?=[A-Z])", "_", self.value).lower()


_TRANSIENT = frozenset(
    {
        JobFailure.SOURCE_UNAVAILABLE,
        JobFailure.NO_CAPACITY,
        JobFailure.TRAINER_LOST,
        JobFailure.PREEMPTED,
        JobFailure.PUBLISH_FAILED,
    }
)
_CODES = {
    JobFailure.INVALID_DATASET: "invalid_training_file",
    JobFailure.EXAMPLE_TOO_LONG: "invalid_training_file",
    JobFailure.TEMPLATE_UNSUPPORTED: "invalid_training_file",
    JobFailure.TOO_FEW_EXAMPLES: "invalid_n_examples",
    JobFailure.GATE_NOT_MET: "evaluation_gate_not_met",
}
