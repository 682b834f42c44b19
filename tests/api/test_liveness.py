"""The heartbeat of an event loop, and contexts that live in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from lorapool_api.liveness import Heartbeat, in_own_thread


async def test_a_loop_counts_as_stuck_when_it_has_not_run_for_its_bound_and_lives_again_when_it_runs() -> None:
    now_s = 100.0
    heartbeat = Heartbeat(30.0, lambda: now_s)
    now_s += 29
    assert heartbeat.alive
    now_s += 2
    assert not heartbeat.alive
    beating = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(0)
    assert heartbeat.alive
    beating.cancel()


async def test_a_context_is_entered_and_exited_in_one_other_thread() -> None:
    threads = []

    @asynccontextmanager
    async def context() -> AsyncIterator[str]:
        threads.append(threading.current_thread())
        yield "inside"
        threads.append(threading.current_thread())

    async with in_own_thread(context, "own") as value:
        assert value == "inside"
        assert len(threads) == 1
    assert threads[0] is threads[1] is not threading.current_thread()
    assert threads[0].name == "own"
    assert not threads[0].is_alive()


async def test_an_error_on_the_way_in_is_raised_to_the_caller() -> None:
    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        raise OSError("the port is taken")
        yield

    with pytest.raises(OSError, match="the port is taken"):
        async with in_own_thread(context, "own"):
            pass
