"""The small parts: queue, caches, settings, merge patch, retry times."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.common import GROUP
from lorapool_api.settings import SettingsError
from lorapool_operator.clock import iso, retry_at_unix_s, unix
from lorapool_operator.decisions.plan_unreadable import plan_unreadable
from lorapool_operator.effects.cluster import merge_patch
from lorapool_operator.settings import read_settings
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import (
    ClusterCache,
    Key,
    ObjectKind,
    PodObject,
    UnreadableObject,
)
from lorapool_operator.world.intake import Intake

NEEDED = {
    "LORAPOOL_OPERATOR_OWN_NAMESPACE": "lorapool",
    "LORAPOOL_OPERATOR_RUNTIME_IMAGE": "runtime:1",
    "LORAPOOL_OPERATOR_PROFILES_FILE": "/profiles.yaml",
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- queue


async def test_a_key_is_handed_out_once_however_often_it_is_added() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(5):
        queue.add("a")
    assert await queue.get() == "a"
    assert queue.ready_depth() == 0


async def test_a_key_that_is_added_while_a_worker_has_it_is_handed_out_again_afterwards() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    key = await queue.get()
    queue.add("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await queue.get()
    queue.done(key)
    assert await queue.get() == "a"


async def test_of_several_times_the_earliest_wins() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a", 60)
    queue.add("a", 0)
    queue.add("a", 30)
    assert await queue.get() == "a"
    queue.done("a")
    assert queue.idle()


async def test_a_failed_key_backs_off_on_its_own() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock, jitter=lambda: 1.0)
    queue.add("bad")
    for wait_s in (0.5, 1.0, 2.0):
        assert await queue.get() == "bad"
        queue.done("bad", failed=True)
        queue.add("good")
        assert await queue.get() == "good"
        queue.done("good")
        clock.now += wait_s - 0.01
        assert queue.ready_depth() == 0
        clock.now += 0.02
        assert queue.ready_depth() == 1


async def test_keys_that_failed_together_are_not_due_together() -> None:
    clock, jitters = Clock(), iter([0.0, 0.5, 0.999])
    queue: WorkQueue[str] = WorkQueue(clock, jitter=lambda: next(jitters))
    for key in "abc":
        queue.add(key)
        queue.done(await queue.get(), failed=True)
    due = []
    for _ in range(100):
        clock.now += 0.01
        due.append(queue.ready_depth())
    assert (due[20], due[30], due[45], due[60]) == (0, 1, 2, 3)


async def test_the_wait_that_was_asked_for_comes_before_the_back_off() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock, jitter=lambda: 0.0)
    queue.add("a")
    queue.done(await queue.get(), failed=True, wait_s=7.0)
    clock.now += 7.2
    assert queue.ready_depth() == 0
    clock.now += 0.1
    assert queue.ready_depth() == 1


async def test_the_age_of_the_oldest_key_is_known() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    assert queue.oldest_age_s() == 0.0
    queue.add("a")
    queue.add("later", 500)
    clock.now += 7
    assert queue.oldest_age_s() == 7.0


async def test_one_key_wakes_one_of_many_waiting_workers() -> None:
    class Counted(Clock):
        calls = 0

        def __call__(self) -> float:
            self.calls += 1
            return self.now

    clock = Counted()
    queue: WorkQueue[str] = WorkQueue(clock)
    workers = [asyncio.create_task(queue.get()) for _ in range(50)]
    await asyncio.sleep(0)
    clock.calls = 0
    queue.add("a")
    done, waiting = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(0)
    assert [task.result() for task in done] == ["a"]
    assert clock.calls < 10  # each worker that wakes looks at the clock
    for task in waiting:
        task.cancel()


async def test_a_worker_that_is_cancelled_when_it_is_woken_leaves_the_key_to_another() -> None:
    queue: WorkQueue[str] = WorkQueue()
    first, second = (asyncio.create_task(queue.get()) for _ in range(2))
    await asyncio.sleep(0)
    queue.add("a")
    first.cancel()
    async with asyncio.timeout(20):
        assert await second == "a"


async def test_waiting_workers_get_keys_that_become_due_later() -> None:
    queue: WorkQueue[str] = WorkQueue()
    workers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.add("c", 0.03)
    queue.add("b", 0.02)
    queue.add("a", 0.02)
    queue.add("a", 0.01)
    async with asyncio.timeout(20):
        assert await asyncio.gather(*workers) == ["a", "b", "c"]


# --- cache and intake


def raw_adapter(
    name: str, version: int, *, uid: str = "u", alias: str | None = None, created: str = "2026-01-01T00:00:00Z"
) -> Any:
    spec = {"baseModelRef": {"name": "tiny"}, "source": {"uri": "hf://org/a"}} | ({"alias": alias} if alias else {})
    return {
        "metadata": {
            "namespace": "team", "name": name, "uid": uid, "generation": 1, "resourceVersion": str(version),
            "creationTimestamp": created,
        },
        "spec": spec,
    }  # fmt: skip


def test_a_late_event_never_overwrites_a_newer_version() -> None:
    cache, queue = ClusterCache(), WorkQueue[Key]()
    intake = Intake(cache, queue.add, counts_interval_s=1.0)
    intake.adapter(raw_adapter("a", 7))
    intake.adapter(raw_adapter("a", 5))
    held = cache.adapters.get("team", "a")
    assert held is not None
    assert held.meta.resource_version == "7"


def raw_base(version: int, *, generation: int = 1, **spec: Any) -> Any:
    return {
        "metadata": {
            "namespace": "team", "name": "tiny", "uid": "b", "generation": generation, "resourceVersion": str(version),
        },
        "spec": {"source": {"uri": "hf://org/base"}, **spec},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "wakes_adapters"), [({"replicas": 1}, False), ({"access": {"namespaces": ["guest"]}}, True)]
)
async def test_only_a_change_that_adapters_see_marks_them_dirty(change: dict[str, Any], wakes_adapters: bool) -> None:
    queue = WorkQueue[Key]()
    intake = Intake(ClusterCache(), queue.add, counts_interval_s=1.0)
    intake.base(raw_base(1, replicas=0))
    for number in range(5):
        intake.adapter(raw_adapter(f"a{number}", 10 + number, uid=f"u{number}"))
    while queue.ready_depth():
        queue.done(await queue.get())
    intake.base(raw_base(99, generation=2, **{"replicas": 0, **change}))
    assert queue.ready_depth() == (6 if wakes_adapters else 1)


def test_an_answer_that_comes_after_the_deletion_revives_nothing() -> None:
    cache = ClusterCache()
    intake = Intake(cache, WorkQueue[Key]().add, counts_interval_s=1.0)
    intake.base(raw_base(1))
    intake.adapter(raw_adapter("a", 7))
    intake.base(raw_base(8), deleted=True)
    intake.adapter(raw_adapter("a", 9), deleted=True)
    intake.wrote_base(raw_base(7))
    intake.wrote_adapter(raw_adapter("a", 8))
    intake.adapter(raw_adapter("a", 8))  # or a read of the resync that began before
    assert (len(cache.bases), len(cache.adapters), cache.adapters_of(Key(ObjectKind.BASE, "team", "tiny"))) == (
        0,
        0,
        [],
    )
    intake.adapter(raw_adapter("a", 10, uid="another"))
    assert len(cache.adapters) == 1


def test_the_deletion_of_an_older_object_leaves_the_new_one() -> None:
    cache = ClusterCache()
    intake = Intake(cache, WorkQueue[Key]().add, counts_interval_s=1.0)
    intake.adapter(raw_adapter("a", 7, uid="new"))
    intake.adapter(raw_adapter("a", 6, uid="old"), deleted=True)
    assert cache.adapters.get("team", "a") is not None


async def test_an_object_that_cannot_be_parsed_is_due_and_keeps_its_last_version() -> None:
    cache, queue = ClusterCache(), WorkQueue[Key]()
    intake = Intake(cache, queue.add, counts_interval_s=100.0)
    intake.adapter(raw_adapter("a", 6))
    key = await queue.get()
    queue.done(key)
    broken = raw_adapter("a", 7)
    del broken["spec"]["source"]
    intake.adapter(broken)
    assert await queue.get() == key
    assert cache.unreadable[key].error == "spec.source: Field required"
    held = cache.adapters.get("team", "a")
    assert held is not None
    assert held.meta.resource_version == "6"
    intake.adapter(raw_adapter("a", 8))
    assert cache.unreadable == {}


@pytest.mark.parametrize(
    "status", [{}, {"conditions": [{"type": "Resolved", "status": "True"}], "usage": "of a newer form"}]
)
def test_an_object_that_cannot_be_parsed_is_not_ready_and_says_so_once(status: dict[str, Any]) -> None:
    raw = raw_adapter("a", 7) | {"status": status}
    plan = plan_unreadable(UnreadableObject(raw, "spec.dtype: not known"), 0.0)
    assert plan is not None
    conditions = {item["type"]: item for item in plan.status["conditions"]}
    assert (conditions["Ready"]["status"], conditions["Ready"]["reason"]) == ("False", "Unreadable")
    assert (conditions["Stalled"]["status"], conditions["Stalled"]["reason"]) == ("True", "Unreadable")
    text = (
        "This version of the operator cannot read the object: spec.dtype: not known. Correct the field, or upgrade the"
    )
    assert conditions["Ready"]["message"].startswith(text)
    assert plan.status["observedGeneration"] == 1
    assert plan.event.type == "Warning"
    assert [item for item in plan.status["conditions"] if item["type"] == "Resolved"] == status.get("conditions", [])
    assert plan_unreadable(UnreadableObject(raw | {"status": plan.status}, "spec.dtype: not known"), 9.0) is None


def test_a_parsed_pod_has_the_runtimes_address_and_the_reason_why_it_does_not_run() -> None:
    pod = PodObject.parse(
        {
            "metadata": {"namespace": "team", "name": "p", "uid": "u", "labels": {f"{GROUP}/base": "tiny"}},
            "spec": {
                "containers": [
                    {"ports": [{"name": "metrics", "containerPort": 9}, {"name": "http", "containerPort": 8}]}
                ]
            },
            "status": {
                "podIP": "10.0.0.1",
                "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}}],
            },
        }
    )
    assert (pod.ip, pod.port, pod.ready) == ("10.0.0.1", 8, False)
    assert pod.problem == "ImagePullBackOff: no such tag"


# --- settings


def test_settings_come_from_the_environment_with_defaults() -> None:
    settings = read_settings({**NEEDED, "LORAPOOL_OPERATOR_NAMESPACES": "b, a", "OTHER": "x"})
    assert settings.watched == ("a", "b")
    assert read_settings({**NEEDED, "LORAPOOL_OPERATOR_NAMESPACES": "*"}).watched == (None,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LORAPOOL_OPERATOR_RESYNC": "5"}, "unknown setting LORAPOOL_OPERATOR_RESYNC"),
        ({"LORAPOOL_OPERATOR_RESYNC_S": "soon"}, "LORAPOOL_OPERATOR_RESYNC_S"),
        ({"LORAPOOL_OPERATOR_WORKERS": "0"}, "LORAPOOL_OPERATOR_WORKERS"),
        ({"LORAPOOL_OPERATOR_LEASE_RENEW_DEADLINE_S": "60"}, "lease_renew_deadline_s"),
        ({"LORAPOOL_OPERATOR_RUNTIME_IMAGE": ""}, "LORAPOOL_OPERATOR_RUNTIME_IMAGE"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({**NEEDED, **changes})
    assert message in str(caught.value)


# --- merge patch, times

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.text(max_size=2), json_values.filter(lambda value: value is not None), max_size=4)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value


def applied(target: Any, patch: Any) -> Any:
    """Applies a merge patch by RFC 7386, as the API server does."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = applied(result.get(name), value)
    return result


@settings(deadline=None)
@given(documents, documents)
def test_a_merge_patch_turns_one_status_into_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    before, after = without_nulls(before), without_nulls(after)
    assert applied(before, merge_patch(before, after)) == after


def test_equal_statuses_need_no_patch() -> None:
    assert merge_patch({"a": {"b": 1}}, {"a": {"b": 1}}) == {}


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0, 0.999))
def test_retry_times_double_within_their_bounds(attempt: int, jitter: float) -> None:
    wait_s = retry_at_unix_s(0.0, attempt, jitter, first_s=5.0, longest_s=300.0)
    assert min(300.0, 5.0 * 2 ** (attempt - 1)) / 2 <= wait_s <= 300.0


def test_the_wait_that_a_source_asks_for_is_kept_up_to_the_longest_wait() -> None:
    assert retry_at_unix_s(0.0, 1, 0.5, first_s=5.0, longest_s=300.0, asked_s=60.0) == 60.0
    assert retry_at_unix_s(0.0, 1, 0.5, first_s=5.0, longest_s=300.0, asked_s=86400.0) == 300.0


def test_times_survive_a_round_trip_through_an_object() -> None:
    assert unix(iso(1_700_000_000.9)) == 1_700_000_000.0
    assert unix("nonsense") is None
