"""Which runtime processes will not report their usage again."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fakes_operator import ScriptedRuntime
from pods import adopt

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.protocol import runtime_token
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key, Meta, ObjectKind, PodObject

MASTER_TOKEN = "m" * 64
META = Meta("team", "tiny", "base-uid", 1, "1", 0.0, False, None)
BASE = BaseObject(META, BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}}), BaseModelStatus())
FAST = PollSettings(wait_s=0.1, pause_s=0.01, stale_s=0.0, timeout_s=1.0)


def pod(name: str, port: int) -> PodObject:
    meta = replace(META, name=name, uid=f"{name}-uid")
    return PodObject(meta, Key(ObjectKind.BASE, "team", "tiny"), "base-uid", "127.0.0.1", port, True, False, "")


async def test_a_pod_that_does_not_answer_keeps_only_its_own_process_from_being_gone() -> None:
    cache, changed = ClusterCache(), asyncio.Event()
    tracker = RuntimeTracker(
        cache, tokens=RuntimeTokens([MASTER_TOKEN]).of, settings=FAST, changed=lambda *_, **__: changed.set()
    )
    asked = ["former-1", "former-2", "boot-silent", "boot-alive"]

    async def until_fresh(*wanted: bool) -> None:
        async with asyncio.timeout(10):
            while tuple(view.fresh for view in tracker.views_of(BASE)) != wanted:
                await changed.wait()
                changed.clear()

    token = runtime_token(MASTER_TOKEN, "base-uid")
    async with ScriptedRuntime(token=token, boot_id="boot-alive").running() as alive:
        async with ScriptedRuntime(token=token, boot_id="boot-silent").running() as silent:
            cache.bases.put(BASE)
            adopt(cache, pod("alive", alive.port))
            adopt(cache, pod("silent", silent.port))
            assert tracker.gone_boot_ids(BASE, asked) == frozenset()  # none has answered yet
            tracker.follow_pods()
            await until_fresh(True, True)
        await until_fresh(True, False)
        assert tracker.gone_boot_ids(BASE, asked) == {"former-1", "former-2"}
        await tracker.close()
