from lorapool_api.common import AdapterCondition, BaseCondition, FailureReason, Reason
from lorapool_api.reasons import ADAPTER_CONDITIONS, BASE_CONDITIONS, FAILURES, REASONS
from lorapool_api.tuning.reasons import JOB_CONDITIONS, JOB_FAILURES, JOB_REASONS
from lorapool_api.tuning.states import JobCondition, JobFailure, JobReason

NOTHING_TO_DO = {
    Reason.RESOLVED,
    Reason.COMPATIBLE,
    Reason.PARKED,
    Reason.LOADING,
    Reason.LOADED,
    Reason.SCALED_TO_ZERO,
    Reason.AVAILABLE,
    Reason.READY,
    Reason.STABLE,
}
NOTHING_TO_DO_FOR_A_JOB = {
    JobReason.VALID,
    JobReason.WAITING_FOR_TURN,
    JobReason.ADMITTED,
    JobReason.TRAINING,
    JobReason.EVALUATING,
    JobReason.PUBLISHING,
    JobReason.RETRYING,
    JobReason.EVALUATED,
    JobReason.NOT_EVALUATED,
    JobReason.PROMOTED,
    JobReason.ENDED,
    JobReason.SUCCEEDED,
    JobReason.CANCELLED,
}


def test_every_condition_and_every_reason_is_explained() -> None:
    assert set(BASE_CONDITIONS) == set(BaseCondition)
    assert set(ADAPTER_CONDITIONS) == set(AdapterCondition)
    assert set(REASONS) == set(Reason)
    assert set(FAILURES) == set(FailureReason)
    assert set(JOB_CONDITIONS) == set(JobCondition)
    assert set(JOB_REASONS) == set(JobReason)
    assert set(JOB_FAILURES) == set(JobFailure)


def test_every_reason_that_asks_for_action_names_a_remedy() -> None:
    without = {reason for reason, why in {**REASONS, **FAILURES}.items() if not why.remedy}
    assert without == NOTHING_TO_DO


def test_every_reason_of_a_job_that_asks_for_action_names_a_remedy() -> None:
    without = {reason for reason, why in {**JOB_REASONS, **JOB_FAILURES}.items() if not why.remedy}
    assert without == NOTHING_TO_DO_FOR_A_JOB
