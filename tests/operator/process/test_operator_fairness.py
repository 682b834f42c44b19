"""Hanging sources of one tenant do not delay other tenants, and requests to the API server keep to their rate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from fakes_operator import FakeInspector, digest, found

from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.inspect import BaseFiles, BaseInspection
from lorapool_operator.decisions.plan import InspectionJob
from lorapool_operator.effects.fair_permits import FairPermits
from lorapool_operator.effects.inspections import InspectionTracker
from lorapool_operator.effects.rate_limit import RateLimit
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker
from lorapool_operator.effects.source_access import SourceAccess
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key, ObjectKind
from lorapool_operator.world.observed import SourceFacts, SourceFailure


class HangingInspector(FakeInspector):
    """Sources whose name begins with `hang` never answer."""

    async def adapter(
        self,
        uri: str,
        revision: str | None,
        expected: str | None,
        base: BaseFacts | None,
        max_rank: int,
        *,
        credentials: Mapping[str, str] | None = None,
    ) -> SourceFacts | SourceFailure:
        await self._hang(uri)
        return found(uri)

    async def base(
        self, uri: str, revision: str | None, *, credentials: Mapping[str, str] | None = None
    ) -> BaseInspection:
        await self._hang(uri)
        return BaseInspection("rev", digest(uri), BaseFiles(), 1)

    async def _hang(self, uri: str) -> None:
        self.asked.append(uri)
        if "hang" in uri:
            await asyncio.Event().wait()


@asynccontextmanager
async def tracker(concurrency: int) -> AsyncIterator[tuple[InspectionTracker, asyncio.Queue[Key]]]:
    cache, finished = ClusterCache(), asyncio.Queue[Key]()
    spec = {"metadata": {"namespace": "team", "name": "tiny", "uid": "b"}, "spec": {"source": {"uri": "hf://org/base"}}}
    cache.bases.put(BaseObject.parse(spec))
    runtimes = RuntimeTracker(
        cache, tokens=RuntimeTokens(["m" * 64]).of, settings=PollSettings(), changed=lambda *_, **__: None
    )
    made = InspectionTracker(
        cache,
        HangingInspector(),
        runtimes,
        concurrency=concurrency,
        timeout_s=3600.0,
        changed=lambda key, delay_s: None if delay_s else finished.put_nowait(key),
        pending_status_s=5.0,
        access=SourceAccess(),
    )
    try:
        yield made, finished
    finally:
        await made.close()


def job(namespace: str, name: str, *, kind: ObjectKind = ObjectKind.ADAPTER) -> InspectionJob:
    base_uid = "b" if kind is ObjectKind.ADAPTER else None
    uri = f"hf://{namespace}/{name}"
    return InspectionJob(Key(kind, namespace, name), uri, "f", 1, uri, None, None, base_uid, 16)


async def test_forty_hanging_sources_of_one_tenant_do_not_delay_the_check_of_another_tenants() -> None:
    async with tracker(8) as (inspections, finished), asyncio.timeout(10):
        for number in range(40):
            inspections.start(job("bad", f"hang{number}"))
        for tenant in ("good", "better"):
            inspections.start(job(tenant, "fine"))
        inspections.start(job("bad", "model", kind=ObjectKind.BASE))
        names = {await finished.get() for _ in range(3)}
        assert {(key.namespace, key.name) for key in names} == {("good", "fine"), ("better", "fine"), ("bad", "model")}


async def test_hanging_base_models_do_not_delay_adapters() -> None:
    async with tracker(8) as (inspections, finished), asyncio.timeout(10):
        for number in range(40):
            inspections.start(job(f"bad{number}", "hang", kind=ObjectKind.BASE))
        inspections.start(job("good", "fine"))
        assert (await finished.get()).namespace == "good"


async def test_a_tenant_alone_gets_half_of_the_permits_and_the_longest_waiting_come_first() -> None:
    permits, running, order = FairPermits(8), set[int](), list[int]()
    release = [asyncio.Event() for _ in range(10)]

    async def work(number: int) -> None:
        async with permits.permit("a"):
            running.add(number)
            order.append(number)
            await release[number].wait()
            running.discard(number)

    tasks = [asyncio.create_task(work(number)) for number in range(10)]
    await asyncio.sleep(0)
    assert running == {0, 1, 2, 3}
    tasks[4].cancel()  # it waits
    tasks[1].cancel()  # it runs
    await asyncio.gather(tasks[1], tasks[4], return_exceptions=True)
    assert running - {1} == {0, 2, 3, 5}
    for event in release:
        event.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 2, 3, 5, 6, 7, 8, 9]


async def test_one_permit_is_enough_for_everyone_in_turn() -> None:
    permits, order = FairPermits(1), list[str]()

    async def work(tenant: str) -> None:
        async with permits.permit(tenant):
            await asyncio.sleep(0)
            order.append(tenant)

    await asyncio.gather(*(work(tenant) for tenant in "aab"))
    assert sorted(order) == ["a", "a", "b"]


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def test_requests_pass_in_a_burst_and_then_at_their_rate() -> None:
    time = Time()
    limit = RateLimit(10.0, 5, clock=time, sleep=time.sleep)
    passed = []
    for _ in range(8):
        await limit.acquire()
        passed.append(round(time.now - 1000.0, 3))
    assert passed == [0.0] * 5 + [0.1, 0.2, 0.3]


async def test_no_request_passes_while_the_server_asked_for_a_pause() -> None:
    time = Time()
    limit = RateLimit(clock=time, sleep=time.sleep)
    await limit.acquire()
    limit.pause(7.0)
    limit.pause(2.0)
    await limit.acquire()
    assert time.now == pytest.approx(1007.0)
