"""A sequence allows only legal transitions of its status."""

from __future__ import annotations

import pytest

from lorapool_runtime.engines.interface import BASE_SLOT, FinishReason, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.scheduling.sequence import IllegalMoveError, Sequence, SequenceStatus


def make(prompt_tokens: int = 3) -> Sequence:
    request = GenerationRequest("r", tuple(range(prompt_tokens)), BASE_SLOT, "base", SamplingParams(max_tokens=5))
    return Sequence(request, arrival=0, seed=0)


def test_a_sequence_goes_from_prompt_to_text() -> None:
    sequence = make(3)
    sequence.admit([4, 9])
    assert sequence.pending == 3
    sequence.advance(2)
    sequence.advance(1)
    sequence.append(77)
    assert (sequence.pending, sequence.generated, sequence.tokens[-1]) == (1, 1, 77)
    assert sequence.finish(FinishReason.LENGTH) == [4, 9]
    assert sequence.status is SequenceStatus.FINISHED


def test_preemption_gives_all_blocks_back_and_keeps_the_text() -> None:
    sequence = make(2)
    sequence.admit([1])
    sequence.advance(2)
    sequence.append(50)
    assert sequence.preempt() == [1]
    assert (sequence.status, sequence.computed, sequence.tokens) == (SequenceStatus.WAITING, 0, [0, 1, 50])
    assert sequence.pending == 3


def test_a_waiting_sequence_neither_advances_nor_takes_a_token() -> None:
    sequence = make()
    with pytest.raises(IllegalMoveError):
        sequence.advance(1)
    with pytest.raises(IllegalMoveError):
        sequence.append(1)
    with pytest.raises(IllegalMoveError):
        sequence.preempt()


def test_a_token_is_refused_while_the_prompt_is_not_computed() -> None:
    sequence = make(3)
    sequence.admit([1])
    sequence.advance(2)
    with pytest.raises(IllegalMoveError):
        sequence.append(1)


def test_it_cannot_advance_past_its_tokens() -> None:
    sequence = make(3)
    sequence.admit([1])
    with pytest.raises(IllegalMoveError):
        sequence.advance(4)


def test_it_is_admitted_once_and_finishes_once() -> None:
    sequence = make()
    sequence.admit([1])
    with pytest.raises(IllegalMoveError):
        sequence.admit([2])
    sequence.finish(FinishReason.STOP)
    with pytest.raises(IllegalMoveError):
        sequence.finish(FinishReason.CANCELLED)


def test_a_waiting_sequence_can_be_cancelled() -> None:
    assert make().finish(FinishReason.CANCELLED) == []
