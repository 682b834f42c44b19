import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapool_api.common import (
    AdapterKey,
    Condition,
    FailureReason,
    FileDigest,
    artifact_digest,
    duration_s,
    quantity_bytes,
    set_conditions,
)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1h30m", 5400), ("2h0m5s", 7205)])
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5d", "m5", "-5s", "1.5h", "5m1h"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="90s"):
        duration_s(text)


@pytest.mark.parametrize(("text", "count"), [("12", 12), ("1k", 1000), ("512Mi", 512 * 2**20), ("2Gi", 2 * 2**30)])
def test_a_quantity_is_read_in_bytes(text: str, count: int) -> None:
    assert quantity_bytes(text) == count


def test_the_digest_of_an_artifact_does_not_depend_on_the_order_of_its_files() -> None:
    one = FileDigest("a.json", 3, "0" * 64)
    two = FileDigest("b.safetensors", 4, "1" * 64)
    expected = hashlib.sha256(f"a.json\0003\0{'0' * 64}\nb.safetensors\0004\0{'1' * 64}\n".encode()).hexdigest()
    assert artifact_digest([two, one]) == artifact_digest([one, two]) == f"sha256:{expected}"


@given(st.uuids(), st.binary(min_size=32, max_size=32))
def test_an_adapter_key_survives_the_header(uid: object, raw: bytes) -> None:
    key = AdapterKey(str(uid), f"sha256:{raw.hex()}")
    assert AdapterKey.parse(str(key)) == key


@given(st.text(max_size=200))
def test_no_text_that_is_not_a_key_is_taken_for_one(text: str) -> None:
    try:
        key = AdapterKey.parse(text)
    except ValueError:
        return
    assert str(key) == text


def test_each_failure_is_transient_or_terminal_and_has_a_stable_code() -> None:
    assert FailureReason.RANK_TOO_HIGH.code == "rank_too_high"
    assert FailureReason.NON_FINITE_WEIGHTS.code == "non_finite_weights"
    assert FailureReason.SOURCE_UNAVAILABLE.transient
    assert not FailureReason.UNAUTHORIZED.transient


def test_the_transition_time_moves_only_with_the_status() -> None:
    before = [Condition(type="Ready", status="True", last_transition_time="t0", reason="Parked")]
    same, other = set_conditions(
        before, {"Ready": ("True", "Loaded", ""), "Loaded": ("True", "Loaded", "")}, generation=2, now="t1"
    )
    assert (same.last_transition_time, same.reason, same.observed_generation) == ("t0", "Loaded", 2)
    assert other.last_transition_time == "t1"
    (turned,) = set_conditions(before, {"Ready": ("False", "WrongBase", "")}, generation=2, now="t1")
    assert turned.last_transition_time == "t1"
