"""Usage is exact however often reports come and whichever process restarts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.loraadapter import UsagePart, UsageStatus
from lorapool_operator.decisions.usage import MAX_PARTS, differs, fold

THEN = "2026-01-01T00:00:00Z"


def part(boot: str, tokens: int, seconds: float = 0.0) -> UsagePart:
    return UsagePart(boot_id=boot, requests=tokens, completion_tokens=tokens, residency_seconds=seconds)


def stored(status: UsageStatus) -> UsageStatus:
    """Returns the status after a round trip through the API server's JSON."""
    return UsageStatus.model_validate(status.dump())


def test_the_same_report_twice_counts_once() -> None:
    once = fold(None, [part("a", 5)], [], THEN)
    assert fold(once, [part("a", 5)], [], THEN) == once
    assert not differs(once, fold(once, [part("a", 5)], [], "2026-01-01T00:01:00Z"))


def test_a_process_that_is_gone_keeps_its_counts_and_loses_its_share() -> None:
    once = fold(None, [part("a", 5)], [], THEN)
    after = fold(once, [part("b", 2)], ["a"], THEN)
    assert (after.completion_tokens, [item.boot_id for item in after.parts]) == (7, ["b"])


def test_the_last_counts_of_a_process_that_ends_are_folded() -> None:
    once = fold(None, [part("a", 5)], [], THEN)
    after = fold(once, [part("a", 8)], ["a"], THEN)
    assert (after.completion_tokens, after.parts) == (8, [])


def test_two_digests_of_one_adapter_report_the_same_counts() -> None:
    assert fold(None, [part("a", 5, 1.0), part("a", 5, 1.2)], [], THEN).completion_tokens == 5


def test_a_report_that_is_older_than_the_last_one_counts_nothing() -> None:
    once = fold(None, [part("a", 1000)], [], THEN)
    late = fold(once, [part("a", 998)], [], THEN)
    assert late.completion_tokens == 1000
    assert fold(late, [part("a", 1005)], [], THEN).completion_tokens == 1005


@pytest.mark.parametrize("processes", [105, 250])
def test_many_processes_are_never_counted_twice(processes: int) -> None:
    reports = [part(f"b{number:03}", 10) for number in range(processes)]
    status = UsageStatus()
    for _ in range(3):
        status = stored(fold(status, reports, [], THEN))
        assert status.completion_tokens == 10 * min(processes, MAX_PARTS)
    gone = [item.boot_id for item in reports]
    assert fold(status, reports, gone, THEN).completion_tokens == 10 * processes


def test_an_adapter_that_was_never_used_writes_nothing() -> None:
    assert not differs(None, fold(None, [part("a", 0)], [], THEN))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 50), st.floats(0, 10), st.booleans()), max_size=30
    )
)
def test_totals_equal_what_all_processes_counted_whatever_is_missed_or_repeated(
    steps: list[tuple[str, int, float, bool]],
) -> None:
    """In each step a process counts more and is folded or not; at the end all processes are folded once more."""
    truth: dict[str, tuple[int, float]] = {}
    status = UsageStatus()
    for boot, tokens, seconds, seen in steps:
        held = truth.get(boot, (0, 0.0))
        truth[boot] = (held[0] + tokens, held[1] + round(seconds, 3))
        if seen:
            status = stored(fold(status, [part(boot, *truth[boot])], [], THEN))
    status = fold(status, [part(boot, *counts) for boot, counts in truth.items()], list(truth), THEN)
    assert status.completion_tokens == sum(tokens for tokens, _ in truth.values())
    assert abs(status.residency_seconds - sum(seconds for _, seconds in truth.values())) < 0.01 * (len(steps) + 1)
    assert status.parts == []
