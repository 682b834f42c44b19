from lorapool_api.common import AdapterCondition, BaseCondition, FailureReason, Reason
from lorapool_api.reasons import ADAPTER_CONDITIONS, BASE_CONDITIONS, FAILURES, REASONS

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


def test_every_condition_and_every_reason_is_explained() -> None:
    assert set(BASE_CONDITIONS) == set(BaseCondition)
    assert set(ADAPTER_CONDITIONS) == set(AdapterCondition)
    assert set(REASONS) == set(Reason)
    assert set(FAILURES) == set(FailureReason)


def test_every_reason_that_asks_for_action_names_a_remedy() -> None:
    without = {reason for reason, why in {**REASONS, **FAILURES}.items() if not why.remedy}
    assert without == NOTHING_TO_DO
