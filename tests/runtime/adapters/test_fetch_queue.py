"""The order of fetches: a share for each namespace, and those that requests wait for first."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fakes_runtime import FakeStore, acquire, descriptor, key_of, serving, until

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import SourceRef
from lorapool_runtime.adapters.fetch_queue import FetchQueue
from lorapool_runtime.adapters.loader import MAX_FETCHES


def keys(namespace: str, count: int) -> list[AdapterKey]:
    return [key_of(f"{namespace}-{number}") for number in range(count)]


def started(queue: FetchQueue, wanted: set[AdapterKey] | None = None) -> list[AdapterKey]:
    found = []
    while (key := queue.start_next(lambda key: wanted is None or key in wanted)) is not None:
        found.append(key)
    return found


def queue_with(total: int, **namespaces: int) -> FetchQueue:
    queue = FetchQueue(total)
    for namespace, count in namespaces.items():
        for key in keys(namespace, count):
            queue.join(key, namespace)
    return queue


def test_one_namespace_leaves_a_share_for_the_next() -> None:
    queue = queue_with(16, slow=50)
    assert started(queue) == keys("slow", 8)
    for key in keys("other", 9):
        queue.join(key, "other")
    assert started(queue) == keys("other", 5)
    queue.leave(keys("slow", 1)[0])
    assert started(queue) == []  # it still has more than its share


def test_namespaces_take_turns() -> None:
    queue = queue_with(6, a=9, b=9)
    assert started(queue) == [keys("a", 2)[0], keys("b", 2)[0], keys("a", 2)[1], keys("b", 2)[1]]


def test_an_adapter_that_a_request_waits_for_is_fetched_before_those_without_one() -> None:
    queue = queue_with(4, a=5, b=1)
    wanted = {keys("a", 5)[4]}
    assert started(queue, wanted)[0] == keys("a", 5)[4]


def test_a_single_fetch_at_a_time_is_still_one() -> None:
    queue = queue_with(1, a=2, b=1)
    assert started(queue) == keys("a", 1)
    queue.leave(keys("a", 1)[0])
    assert len(started(queue)) == 1


async def test_sources_of_one_namespace_that_hang_do_not_stop_the_loads_of_another(byte_tokenizer: Path) -> None:
    class SlowStore(FakeStore):
        async def fetch(self, digest, source, max_bytes, *, namespace):  # type: ignore[no-untyped-def]  # as in the parent
            if source.uri.startswith("s3://slow/"):
                self.fetches["slow"] += 1
                await asyncio.Event().wait()
            return await super().fetch(digest, source, max_bytes, namespace=namespace)

    store = SlowStore()
    async with serving(byte_tokenizer, store=store, slots=1) as served:
        manager = served.runtime.adapters
        waiting = []
        for number in range(MAX_FETCHES + 4):
            slow = descriptor(f"slow{number}", display=f"slow/{number}", source=SourceRef(uri=f"s3://slow/{number}"))
            await manager.register(key_of(f"slow{number}"), slow)
            waiting.append(asyncio.create_task(acquire(manager, key_of(f"slow{number}"))))
        await until(lambda: store.fetches["slow"] > 0)
        await manager.register(key_of("poet"), descriptor("poet"))
        (await asyncio.wait_for(acquire(manager, key_of("poet")), 5)).release()
        assert store.fetches["slow"] == MAX_FETCHES // 2
        for task in waiting:
            task.cancel()
