"""Slots are filled in the background: in order, at a lower priority, and every error reaches its future."""

from __future__ import annotations

import os
import threading

import pytest
from engine_kit import Collector, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.background import NICENESS, BackgroundThread
from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.lora.slot_memory import PackedWeights
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots


def test_work_is_done_in_order_by_one_thread_of_lower_priority() -> None:
    background, done = BackgroundThread("slot-filler"), []

    def note(number: int) -> tuple[int, str, int]:
        done.append(number)
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return number, threading.current_thread().name, priority

    futures = [background.submit(lambda number=number: note(number)) for number in range(20)]
    found = [future.result(10) for future in futures]
    assert done == list(range(20))
    assert {name for _, name, _ in found} == {"slot-filler"}
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert {priority for _, _, priority in found} == {max(own, NICENESS)}


def test_an_error_reaches_its_future_and_the_next_work_is_done() -> None:
    background = BackgroundThread("worker")
    broken, fine = background.submit(lambda: 1 // 0), background.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        broken.result(10)
    assert fine.result(10) == 7


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_engine_thread_neither_fills_nor_releases_slots(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = peft_world(
        tmp_path_factory.mktemp("world"), tiny_model("Llama"), {"one": {"r": 4, "target_modules": ["q_proj"]}}
    )
    engine, got, threads = started(world.base), Collector(), set()
    with pytest.MonkeyPatch.context() as patch:
        fill, release = AdapterSlots.fill, AdapterSlots.release

        def spied_fill(slots: AdapterSlots, slot: int, weights: PackedWeights) -> int:
            threads.add(threading.current_thread().name)
            return fill(slots, slot, weights)

        def spied_release(slots: AdapterSlots, slot: int) -> int:
            threads.add(threading.current_thread().name)
            return release(slots, slot)

        patch.setattr(AdapterSlots, "fill", spied_fill)
        patch.setattr(AdapterSlots, "release", spied_release)
        try:
            engine.submit(request("busy", (5, 9, 17), greedy(60), slot=BASE_SLOT), got)
            for _ in range(5):
                adapter = engine.read_adapter(str(world.adapters["one"]), max_rank=16)
                outcome = engine.load(1, adapter).result(10)
                assert outcome.device_bytes >= adapter.host_bytes
                del adapter  # the slot is now the last owner of the adapter's memory
                assert engine.unload(1).result(10) == outcome.device_bytes
            got.wait(["busy"])
            assert got.tokens("busy") == world.answer(None, (5, 9, 17), 60)
        finally:
            engine.stop(10)
    assert threads == {"slot-filler"}
