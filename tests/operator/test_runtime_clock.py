"""Times that runtimes report are read on the operator's clock, however wrong a node's clock is."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from fakes_operator import ScriptedRuntime
from pods import adopt

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.protocol import runtime_token
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker, clock_skew
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key, Meta, ObjectKind, PodObject

MASTER_TOKEN = "m" * 64
META = Meta("team", "tiny", "base-uid", 1, "1", 0.0, False, None)
BASE = BaseObject(META, BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}}), BaseModelStatus())


@pytest.mark.parametrize("behind_s", [120.0, -120.0])
async def test_a_nodes_wrong_clock_shifts_no_time_of_its_runtime(behind_s: float) -> None:
    cache, changed = ClusterCache(), asyncio.Event()
    tracker = RuntimeTracker(
        cache,
        tokens=RuntimeTokens([MASTER_TOKEN]).of,
        settings=PollSettings(),
        changed=lambda *_, **__: changed.set(),
    )
    used = time.time() - 3
    async with ScriptedRuntime(token=runtime_token(MASTER_TOKEN, "base-uid")).running() as runtime:
        runtime.load = {"now_unix_s": time.time() - behind_s, "last_request_unix_s": used - behind_s}
        key = Key(ObjectKind.BASE, "team", "tiny")
        meta = replace(META, name="pod", uid="pod-uid")
        cache.bases.put(BASE)
        adopt(cache, PodObject(meta, key, "base-uid", "127.0.0.1", runtime.port, True, False, ""))
        tracker.follow_pods()
        await asyncio.wait_for(changed.wait(), 10)
        [view] = tracker.views_of(BASE)
        await tracker.close()
    assert view.snapshot is not None
    assert abs(view.local_time(view.snapshot.last_request_unix_s) - used) < 2


def test_the_time_a_response_takes_does_not_move_the_clock() -> None:
    assert clock_skew(0.0, 1.5) == 0.0
    assert clock_skew(120.0, 119.0) == 120.0
    assert clock_skew(0.0, -120.0) == -120.0
    assert clock_skew(120.0, 0.5) == 0.5
