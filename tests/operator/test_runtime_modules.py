"""The operator asks a runtime for the modules of its base until it has them, and not too often."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from fakes_operator import ScriptedRuntime
from gateway_world import until
from pods import adopt

from lorapool_api.base_modules import BaseModules
from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.protocol import runtime_token
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_operator.effects.runtime_polls import MODULES_RETRY_S, PollSettings, RuntimeTracker
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key, Meta, ObjectKind, PodObject

MASTER = "m" * 64
META = Meta("team", "tiny", "base-uid", 1, "1", 0.0, False, None)
BASE = BaseObject(META, BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}}), BaseModelStatus())
FAST = PollSettings(wait_s=0.0, pause_s=0.0, stale_s=0.0, timeout_s=2.0)


@dataclass
class Asking:
    runtime: ScriptedRuntime
    tracker: RuntimeTracker
    now_s: list[float] = field(default_factory=lambda: [1000.0])

    async def some_polls(self) -> None:
        """Returns once the runtime was polled a few times more."""
        before = self.tracker.polls
        await until(lambda: self.tracker.polls >= before + 3)


@asynccontextmanager
async def asking(status: int) -> AsyncIterator[Asking]:
    cache, now_s = ClusterCache(), [1000.0]
    tracker = RuntimeTracker(
        cache,
        tokens=RuntimeTokens([MASTER]).of,
        settings=FAST,
        changed=lambda *_, **__: None,
        clock=lambda: now_s[0],
    )
    async with ScriptedRuntime(token=runtime_token(MASTER, "base-uid")).running() as runtime:
        runtime.modules_status = status
        cache.bases.put(BASE)
        key = Key(ObjectKind.BASE, "team", "tiny")
        adopt(cache, PodObject(replace(META, name="pod", uid="pod"), key, "base-uid", "127.0.0.1", runtime.port, True,
                               False, ""))  # fmt: skip
        tracker.follow_pods()
        yield Asking(runtime, tracker, now_s)
        await tracker.close()


async def test_modules_that_could_not_be_read_are_asked_for_again_after_a_while() -> None:
    async with asking(status=503) as here:
        await until(lambda: here.runtime.modules_asked)
        await here.some_polls()
        assert here.runtime.modules_asked == [503]
        here.runtime.modules = BaseModules(modules=[])
        here.now_s[0] += MODULES_RETRY_S
        await until(lambda: here.tracker.modules_of(BASE) is not None)
        await here.some_polls()
        assert here.runtime.modules_asked == [503, 200]


async def test_a_runtime_that_does_not_know_the_route_is_asked_once() -> None:
    async with asking(status=404) as here:
        await until(lambda: here.runtime.modules_asked)
        here.now_s[0] += MODULES_RETRY_S
        await here.some_polls()
        assert here.runtime.modules_asked == [404]
