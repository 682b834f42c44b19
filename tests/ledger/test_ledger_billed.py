"""What an attempt comes to, from two halves of which either may be missing."""

from __future__ import annotations

import pytest

from lorapool_api.usage_protocol import AttemptEnd, Ended
from lorapool_ledger.billing.billed import Billed, CountSource, GatewayHalf, RuntimeHalf, final_outcome, result_of

COMPUTED = (10, 4, 5)
REPORTED = (10, 4, 3)


def billed(
    runtime: Ended | None, gateway: AttemptEnd | None, reported: tuple[int, int, int] | None = REPORTED
) -> tuple[int, ...]:
    half = None if gateway is None else GatewayHalf(gateway, *(reported or (None, None, None)))
    result = result_of(None if runtime is None else RuntimeHalf(runtime, *COMPUTED), half)
    return result.billed_prompt_tokens, result.billed_cached_tokens, result.billed_completion_tokens


@pytest.mark.parametrize(
    ("runtime", "gateway", "expected"),
    [
        (Ended.COMPLETED, AttemptEnd.COMPLETED, (6, 4, 5)),
        (Ended.CANCELLED, AttemptEnd.CLIENT_LEFT, (6, 4, 5)),
        (Ended.COMPLETED, AttemptEnd.CLIENT_LEFT, (6, 4, 5)),
        (Ended.COMPLETED, AttemptEnd.LOST, (0, 0, 0)),
        (Ended.COMPLETED, AttemptEnd.WITHHELD, (0, 0, 0)),
        (Ended.CANCELLED, AttemptEnd.TIMEOUT, (0, 0, 0)),
        (Ended.FAILED, AttemptEnd.FAILED, (0, 0, 0)),
        (Ended.LOST, AttemptEnd.LOST, (0, 0, 0)),
        (Ended.COMPLETED, None, (6, 4, 5)),
        (Ended.CANCELLED, None, (6, 4, 5)),
        (Ended.LOST, None, (0, 0, 0)),
        (None, AttemptEnd.COMPLETED, (6, 4, 3)),
        (None, AttemptEnd.CLIENT_LEFT, (6, 4, 3)),
        (None, AttemptEnd.LOST, (0, 0, 0)),
        (None, AttemptEnd.REFUSED, (0, 0, 0)),
    ],
)
def test_who_pays(runtime: Ended | None, gateway: AttemptEnd | None, expected: tuple[int, int, int]) -> None:
    assert billed(runtime, gateway) == expected


def test_counts_are_of_the_runtime_where_it_has_them_and_never_estimated() -> None:
    both = result_of(RuntimeHalf(Ended.COMPLETED, *COMPUTED, 7), GatewayHalf(AttemptEnd.COMPLETED, *REPORTED))
    assert (both.source, both.completion_tokens, both.delivered_tokens, both.gpu_ns) == (CountSource.RUNTIME, 5, 3, 7)
    silent = GatewayHalf(AttemptEnd.LOST)
    assert result_of(None, silent).source is CountSource.NONE
    assert result_of(None, silent, runtime_gone=True).outcome is Billed.UNKNOWN
    assert result_of(None, None, runtime_gone=True).source is CountSource.UNKNOWN
    assert result_of(None, GatewayHalf(AttemptEnd.REFUSED), runtime_gone=True).source is CountSource.NONE
    assert result_of(None, GatewayHalf(AttemptEnd.LOST, *REPORTED), runtime_gone=True).source is CountSource.GATEWAY


def test_every_pair_of_ends_has_an_outcome() -> None:
    for runtime in (*Ended, None):
        for gateway in (*AttemptEnd, None):
            assert isinstance(final_outcome(runtime, gateway), Billed)
