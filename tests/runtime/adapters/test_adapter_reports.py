"""The snapshot's report of an adapter is always current, although an unchanged report is reused."""

from __future__ import annotations

from pathlib import Path

from fakes_runtime import FakeClock, acquire, descriptor, key_of, serving, until

from lorapool_api.protocol import AdapterState, Tier, Usage
from lorapool_runtime.accounts.usage import Outcome


async def test_the_report_of_an_unchanged_adapter_is_made_once(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock()) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet"))
        (first,) = manager.reports()
        clock.pass_s(100)
        (second,) = manager.reports()
    assert second is first
    assert first.state is AdapterState.REGISTERED


async def test_a_report_is_made_again_after_every_change(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock()) as served:
        manager = served.runtime.adapters
        await manager.register(key_of("poet"), descriptor("poet", idle_after_s=0.0))
        manager.reports()
        lease = await acquire(manager, key_of("poet"))
        (used,) = manager.reports()
        assert (used.state, used.in_flight, used.usage.loads) == (AdapterState.LOADED, 1, 1)
        clock.pass_s(7)
        (later,) = manager.reports()
        assert later.usage.residency_seconds == used.usage.residency_seconds + 7  # nothing but time has passed
        lease.usage.count(Outcome.COMPLETED, Usage(prompt_tokens=3, completion_tokens=2))
        lease.release()
        (counted,) = manager.reports()
        assert (counted.in_flight, counted.usage.requests, counted.usage.prompt_tokens) == (0, 1, 3)
        manager.sweep()
        await until(lambda: manager.reports()[0].state is AdapterState.REGISTERED)
        assert manager.reports()[0].tier is Tier.HOST
        await manager.register(key_of("poet"), descriptor("poet", display="team/bard", pinned=True))
        assert (manager.reports()[0].display, manager.reports()[0].pinned) == ("team/bard", True)
