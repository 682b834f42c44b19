"""The operator's copy of a runtime's reports follows the changes that the runtime sends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from fakes_runtime import Served, acquire, descriptor, key_of, save_byte_tokenizer, serving, until
from pods import adopt

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus
from lorapool_api.protocol import runtime_token, token_sha256
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker
from lorapool_operator.world.cluster_cache import (
    AdapterObject,
    BaseObject,
    ClusterCache,
    Key,
    Meta,
    ObjectKind,
    PodObject,
)

MASTER = "m" * 64
BASE = Key(ObjectKind.BASE, "team", "tiny")
SPEC = {"source": {"uri": "hf://org/tiny"}}
META = Meta("team", "pod", "pod-uid", 1, "1", 0.0, False, None)
OF = BaseObject(replace(META, name="tiny", uid="base-uid"), BaseModelSpec.model_validate(SPEC), BaseModelStatus())
PROOF = {"token_sha256": token_sha256(runtime_token(MASTER, "base-uid")), "pod_uid": "pod-uid"}


def adapter(name: str) -> AdapterObject:
    spec = LoraAdapterSpec.model_validate({"baseModelRef": {"name": "tiny"}, "source": {"uri": f"hf://org/{name}"}})
    return AdapterObject(replace(META, name=name, uid=f"uid-{name}"), spec, LoraAdapterStatus())


@dataclass
class Changes:
    """The uids of every call, in order."""

    calls: list[set[str]] = field(default_factory=list)

    def __call__(self, base: Key, adapter_uids: Iterable[str], *, urgent: bool, serving: bool) -> None:
        self.calls.append(set(adapter_uids))


def tracker_of(served: Served, changes: Changes, port: int | None = None) -> RuntimeTracker:
    cache, port = ClusterCache(), port or urlsplit(served.url).port
    assert port is not None
    cache.bases.put(OF)
    cache.put_adapter(adapter("a8"))
    adopt(cache, PodObject(META, BASE, "base-uid", "127.0.0.1", port, True, False, ""))
    settings = PollSettings(wait_s=5.0, pause_s=0.0)
    tracker = RuntimeTracker(cache, tokens=RuntimeTokens([MASTER]).of, settings=settings, changed=changes)
    tracker.follow_pods()
    return tracker


async def test_a_change_of_one_adapter_touches_that_adapter_alone(tmp_path: Path) -> None:
    async with serving(save_byte_tokenizer(tmp_path), **PROOF) as served:
        for number in range(50):
            await served.runtime.adapters.register(key_of(f"a{number}"), descriptor(f"a{number}"))
        changes = Changes()
        tracker = tracker_of(served, changes)
        try:
            await until(lambda: tracker.holders_of("uid-a49"))
            changes.calls.clear()
            (await acquire(served.runtime.adapters, key_of("a7"))).release()
            await until(lambda: tracker.holders_of("uid-a7")[0].reports[0].last_used_unix_s)
            await served.runtime.adapters.delete(key_of("a8"))
            await until(lambda: not tracker.holders_of("uid-a8"))
            assert set().union(*changes.calls) == {"uid-a7", "uid-a8"}
            assert len(tracker.holders_of("uid-a9")) == 1  # not repeated, and known nevertheless
            assert [part.boot_id for part in tracker.lost_usage("uid-a8")] == [served.runtime.boot_id]
        finally:
            await tracker.close()


async def test_one_of_two_digests_goes_and_the_other_stays(tmp_path: Path) -> None:
    async with serving(save_byte_tokenizer(tmp_path), **PROOF) as served:
        for version in ("1", "2"):
            await served.runtime.adapters.register(key_of("a", version), descriptor("a"))
        tracker = tracker_of(served, Changes())
        try:
            await until(lambda: tracker.holders_of("uid-a"))
            assert len(tracker.holders_of("uid-a")[0].reports) == 2
            await served.runtime.adapters.delete(key_of("a", "1"))
            await until(lambda: len(tracker.holders_of("uid-a")[0].reports) == 1)
            assert tracker.holders_of("uid-a")[0].report(key_of("a", "2").digest) is not None
            assert tracker.lost_usage("uid-a") == ()  # the process still reports it
        finally:
            await tracker.close()


async def test_the_view_of_a_runtime_is_one_object_until_something_about_it_changes(tmp_path: Path) -> None:
    async with serving(save_byte_tokenizer(tmp_path), **PROOF) as served:
        tracker = tracker_of(served, Changes())
        try:
            await tracker.answered(20.0)
            (view,) = tracker.views_of(OF)
            assert view.serving
            assert tracker.views_of(OF)[0] is view
            assert tracker.replicas_of(OF, "unknown")[0].runtime is view
            await served.runtime.adapters.register(key_of("a"), descriptor("a"))
            await until(lambda: tracker.holders_of("uid-a"))
            (changed,) = tracker.views_of(OF)
            assert changed.snapshot is not view.snapshot
        finally:
            await tracker.close()


async def test_waiting_for_first_answers_ends_when_each_runtime_has_answered_or_failed(tmp_path: Path) -> None:
    async with serving(save_byte_tokenizer(tmp_path), **PROOF) as served:
        tracker = tracker_of(served, Changes())
        try:
            async with asyncio.timeout(20):
                await tracker.answered(3600.0)
            assert tracker.polls == 1
        finally:
            await tracker.close()
        failing = tracker_of(served, Changes(), port=1)
        try:
            async with asyncio.timeout(20):
                await failing.answered(3600.0)
            assert failing.poll_failures == 1
        finally:
            await failing.close()
