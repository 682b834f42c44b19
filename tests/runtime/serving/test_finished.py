"""The ring of finished requests: numbered, readable in pages, and bounded in time and memory."""

from __future__ import annotations

import pytest
from fakes_runtime import FakeClock

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import RequestOutcome, Usage
from lorapool_runtime.serving import finished
from lorapool_runtime.serving.caller import Caller
from lorapool_runtime.serving.finished import FinishedRing

KEY = AdapterKey("uid", "sha256:" + "a" * 64)


def add(ring: FinishedRing, number: int) -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=number, cached_tokens=1)
    ring.add(Caller(f"request-{number}", f"attempt-{number}"), KEY, RequestOutcome.COMPLETED, usage)


def test_a_reader_gets_every_request_once_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "PAGE", 4)
    ring = FinishedRing("boot", FakeClock().clock())
    after, read = 0, []
    for number in range(1, 11):
        add(ring, number)
    while (answer := ring.after(after)).requests:
        read += [item.completion_tokens for item in answer.requests]
        after = answer.last_seq
    assert read == list(range(1, 11))
    assert (ring.after(after).last_seq, ring.after(after).first_seq) == (10, 1)


def test_requests_are_kept_for_ten_minutes_and_not_for_ever() -> None:
    clock = FakeClock()
    ring = FinishedRing("boot", clock.clock())
    add(ring, 1)
    clock.pass_s(600)
    add(ring, 2)
    assert [item.completion_tokens for item in ring.after(0).requests] == [1, 2]
    clock.pass_s(600)
    add(ring, 3)
    answer = ring.after(0)
    assert ([item.completion_tokens for item in answer.requests], answer.first_seq) == ([2, 3], 2)
    assert ring.usage_of("attempt-1") is None
    assert ring.usage_of("attempt-2") == Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)


def test_a_burst_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "KEEP_REQUESTS", 50)
    ring = FinishedRing("boot", FakeClock().clock())
    for number in range(1, 201):
        add(ring, number)
    assert (ring.after(0).first_seq, len(ring.after(0).requests), len(ring._by_attempt)) == (151, 50, 50)


def test_an_empty_ring_asks_its_reader_to_continue_where_it_is() -> None:
    assert FinishedRing("boot", FakeClock().clock()).after(0).last_seq == 0
