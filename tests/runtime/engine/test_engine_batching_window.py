"""An idle engine starts requests that arrive together in one step, and does not delay a lone or a late one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from engine_kit import Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.engine import TorchEngine

PROMPT = (5, 9, 17, 33)
LONG_S = 5.0
"""So long that no pause of the machine ends the window by accident; the tests do not wait for its end."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), tiny_model("Llama"), {})


def steps(engine: TorchEngine, ids: list[str], max_tokens: int = 1) -> int:
    """The number of steps for requests submitted one by one, each after longer than an idle engine needs to begin."""
    got, before = Collector(), engine.observe().steps
    for request_id in ids:
        engine.submit(request(request_id, PROMPT, greedy(max_tokens)), got)
        time.sleep(0.2)
    got.wait(ids)
    return engine.observe().steps - before


def test_a_request_that_arrives_within_the_window_begins_with_the_first_one(world: PeftWorld) -> None:
    engine = started(world.base, batching_window_s=LONG_S, max_batch=3)
    try:
        assert steps(engine, ["a", "b", "c"], max_tokens=5) == 5
    finally:
        engine.stop(10)


def test_the_window_ends_when_no_other_request_arrives(world: PeftWorld) -> None:
    engine = started(world.base, batching_window_s=0.01, max_batch=3)
    try:
        assert steps(engine, ["alone"], max_tokens=5) == 5
    finally:
        engine.stop(10)


def test_a_running_batch_does_not_wait_for_later_requests(world: PeftWorld) -> None:
    engine, got = started(world.base, batching_window_s=0.0, max_batch=3), Collector(pause_s=0.02)
    try:
        engine.submit(request("first", PROMPT, greedy(40)), got)
        got.next()
        engine._loaded().batching_window_s = LONG_S  # from here on a wait would be noticed
        engine.submit(request("second", PROMPT, greedy(1)), got)
        got.wait(["second"])
        assert not got.ended("first")
        got.wait(["first"])
    finally:
        engine.stop(10)


def test_a_request_cancelled_within_the_window_ends(world: PeftWorld) -> None:
    engine, got = started(world.base, batching_window_s=0.3, max_batch=3), Collector()
    try:
        engine.submit(request("a", PROMPT, greedy(5)), got)
        engine.cancel("a")
        got.wait(["a"])
        assert got.tokens("a") == []
    finally:
        engine.stop(10)


def test_a_negative_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batching_window_s"):
        EngineConfig(str(tmp_path), batching_window_s=-0.001)
