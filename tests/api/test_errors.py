from lorapool_api.common import FailureReason
from lorapool_api.openai import InvalidRequestError, ModelNotFoundError, TooManyRequestsError, client_fault


def test_an_error_has_the_four_fields_of_openai() -> None:
    error = InvalidRequestError("`n` must be at most 8, not 9.", param="n")
    assert error.body() == {
        "error": {
            "message": "`n` must be at most 8, not 9.",
            "type": "invalid_request_error",
            "param": "n",
            "code": None,
        }
    }


def test_a_long_model_name_is_not_echoed_whole() -> None:
    assert len(ModelNotFoundError("x" * 5000).message) < 250


def test_retry_after_is_a_whole_number_of_seconds_of_at_least_one() -> None:
    assert TooManyRequestsError("busy", retry_after_s=0.2).headers() == {"Retry-After": "1"}
    assert TooManyRequestsError("busy").headers() == {}


def test_a_terminal_failure_is_422_and_a_transient_one_503_with_retry_after() -> None:
    terminal = client_fault(FailureReason.RANK_TOO_HIGH, "rank 64 > 16")
    assert (terminal.status, terminal.code, terminal.headers()) == (422, "rank_too_high", {})
    transient = client_fault(FailureReason.SOURCE_UNAVAILABLE, "the hub answers 502", retry_after_s=12)
    assert (transient.status, transient.code, transient.headers()) == (503, "source_unavailable", {"Retry-After": "12"})
