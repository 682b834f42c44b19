"""Slots are filled beside the batch: in order, at a lower priority, and with every error told to who asked."""

from __future__ import annotations

import os
import threading

import pytest
from engine_kit import Collector, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.background import NICENESS, SlotFiller
from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.lora.slot_memory import PackedWeights
from lorapool_runtime.engines.torch.lora.slots import Slabs
from lorapool_runtime.weights.pack import Pace


def test_work_is_done_in_order_by_one_thread_of_lower_priority() -> None:
    filler, done = SlotFiller(), []

    def note(number: int) -> tuple[int, str, int]:
        done.append(number)
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return number, threading.current_thread().name, priority

    futures = [filler.submit(lambda number=number: note(number)) for number in range(20)]
    found = [future.result(10) for future in futures]
    assert done == list(range(20))
    assert {name for _, name, _ in found} == {"slot-filler"}
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert {priority for _, _, priority in found} == {max(own, NICENESS)}


def test_an_error_is_told_and_the_next_piece_of_work_is_done() -> None:
    filler = SlotFiller()
    broken, fine = filler.submit(lambda: 1 // 0), filler.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        broken.result(10)
    assert fine.result(10) == 7


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_engine_thread_neither_fills_nor_empties(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = peft_world(
        tmp_path_factory.mktemp("world"), tiny_model("Llama"), {"one": {"r": 4, "target_modules": ["q_proj"]}}
    )
    engine, got, threads = started(world.base), Collector(), set()
    with pytest.MonkeyPatch.context() as patch:
        fill, release = Slabs.fill, Slabs.release

        def spied_fill(slabs: Slabs, slot: int, weights: PackedWeights, pace: Pace) -> None:
            threads.add(threading.current_thread().name)
            fill(slabs, slot, weights, pace)

        def spied_release(slabs: Slabs, slot: int) -> int:
            threads.add(threading.current_thread().name)
            return release(slabs, slot)

        patch.setattr(Slabs, "fill", spied_fill)
        patch.setattr(Slabs, "release", spied_release)
        try:
            engine.submit(request("busy", (5, 9, 17), greedy(60), slot=BASE_SLOT), got)
            for _ in range(5):
                adapter = engine.read_adapter(str(world.adapters["one"]), max_rank=16)
                outcome = engine.load(1, adapter).result(10)
                assert outcome.device_bytes >= adapter.host_bytes
                del adapter  # where a slot is its adapter's own memory, the last to let go gives it back
                assert engine.unload(1).result(10) == outcome.device_bytes
            got.wait(["busy"])
            assert got.tokens("busy") == world.answer(None, (5, 9, 17), 60)
        finally:
            engine.stop(10)
    assert threads == {"slot-filler"}
