"""What the observer hands from one plan to others: pins, moved adapters, rollouts elsewhere, yielded devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

from base_world import IMAGE, KEY, NOW, base, deployment, meta, pod, runtime
from pods import adopt

from lorapool_api.common import Condition
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus, PlacementStatus
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_operator.effects.source_access import SourceAccess
from lorapool_operator.observe import ROLLOUT_SEEN_S, YIELD_PAUSE_S, Observer
from lorapool_operator.world.cluster_cache import AdapterObject, ClusterCache, Key, ObjectKind
from lorapool_operator.world.observed import AdapterSummary, RuntimeView, ScaleMemory, Standing
from lorapool_operator.world.profiles import RuntimeProfile

GPU = frozenset({"nvidia.com/gpu"})
OTHER = Key(ObjectKind.BASE, "team", "other")


class Here:
    """An observer of one base, whose runtimes the test sets."""

    def __init__(self, **spec: Any) -> None:
        self.now, self.views, self.cache = NOW, [runtime("a")], ClusterCache()
        self.cache.bases.put(base(**spec))
        runtimes, inspections = MagicMock(), MagicMock()
        runtimes.views_of = lambda of: self.views
        runtimes.replicas_of = runtimes.strays_of = lambda *_: []
        runtimes.lost_usage = lambda uid: ()
        profiles = {"default": RuntimeProfile()}
        self.observer = Observer(
            self.cache, runtimes, inspections, profiles=profiles, images={"torch": IMAGE},
            tokens=RuntimeTokens(["m" * 64]).of, access=SourceAccess(), now=lambda: self.now,
        )  # fmt: skip

    def adapter(self, name: str, status: LoraAdapterStatus | None = None, *, age_s: float = 0.0, **spec: Any) -> Key:
        made = {"baseModelRef": {"name": "tiny"}, "source": {"uri": f"hf://org/{name}"}, **spec}
        ready = Condition(type="Ready", status="True", reason="Parked", last_transition_time="2026-01-01T00:00:00Z")
        known = status or LoraAdapterStatus(conditions=[ready])
        of = replace(meta(name, f"{name}-uid"), created_unix_s=NOW - age_s)
        item = AdapterObject(of, LoraAdapterSpec.model_validate(made), known)
        self.cache.put_adapter(item)
        return item.key

    def summaries(self) -> tuple[AdapterSummary, ...]:
        observed = self.observer.base(KEY)
        assert observed is not None
        return observed.adapters

    def moved(self) -> tuple[Key, ...]:
        observed = self.observer.base(KEY)
        assert observed is not None
        return observed.moved

    def pins(self, key: Key) -> frozenset[str] | None:
        observed = self.observer.adapter(key)
        assert observed is not None
        return observed.allowed_pins

    def serve(self, *views: RuntimeView) -> None:
        self.views = list(views)


def test_a_profile_is_seen_only_from_the_namespaces_that_may_use_it() -> None:
    here = Here()
    for allowed, denied in ((("others",), True), (("others", "team"), False), ((), False)):
        here.observer.profiles = {"default": RuntimeProfile(allowed_namespaces=allowed)}
        observed = here.observer.base(KEY)
        assert observed is not None
        assert (observed.profile is None, observed.profile_denied) == (denied, denied)


def test_the_oldest_adapters_get_the_pins_and_the_next_one_follows_when_one_is_deleted() -> None:
    here = Here(lora={"maxPinned": 1})
    young = here.adapter("young", minReplicas=1)
    old = here.adapter("old", minReplicas=1, age_s=100)
    cold = here.adapter("cold")
    assert (here.pins(old), here.pins(young), here.pins(cold)) == ({"a-uid"}, frozenset(), None)
    assert here.moved() == ()
    here.cache.drop_adapter("team", "old")
    assert here.moved() == (young,)
    assert here.pins(young) == {"a-uid"}


def test_adapters_that_the_operator_places_are_planned_again_when_a_replica_comes() -> None:
    here = Here()
    pinned = here.adapter("pinned", minReplicas=2)
    hot = here.adapter("hot", LoraAdapterStatus(placement=PlacementStatus(k=2)))
    here.adapter("cold")
    here.moved()
    here.serve(runtime("a"), runtime("b"))
    assert here.pins(pinned) == {"a-uid", "b-uid"}  # an adapter's plan may come first
    assert set(here.moved()) == {pinned, hot}
    assert here.moved() == ()


def test_loaded_adapters_are_planned_again_when_a_pod_is_about_to_be_stopped() -> None:
    here = Here()
    loaded = Condition(type="Loaded", status="True", reason="Loaded", last_transition_time="2026-01-01T00:00:00Z")
    key = here.adapter("loaded", LoraAdapterStatus(conditions=[loaded]))
    here.moved()
    here.observer.memory(base()).scale = ScaleMemory(leaving=("a-uid",))
    assert here.moved() == (key,)
    observed = here.observer.adapter(key)
    assert observed is not None
    assert observed.leaving == {"a-uid"}


def test_pods_of_the_old_template_leave_while_a_rollout_is_under_way() -> None:
    here = Here()
    key = here.adapter("any")
    adopt(here.cache, pod("a", template_hash="old"))
    of = adopt(here.cache, pod("b", template_hash="new"))
    for rolling, leaving in ((False, frozenset()), (True, {"a-uid"})):
        known = meta("tiny-runtime", f"deployment-{of.base_uid}")
        made = replace(deployment(), meta=known, template_hash="new", rolling=rolling)
        here.cache.deployments.drop("team", "tiny-runtime")
        here.cache.deployments.put(made)
        here.moved()
        observed = here.observer.adapter(key)
        assert observed is not None
        assert observed.leaving == leaving


def test_a_rollout_elsewhere_counts_from_its_plan_on() -> None:
    here = Here()

    def elsewhere() -> tuple[str, ...]:
        observed = here.observer.base(KEY)
        assert observed is not None
        return observed.rolling_elsewhere

    here.observer.rollout_begins(OTHER)
    here.observer.rollout_begins(KEY)
    assert elsewhere() == ("team/other",)
    here.now += ROLLOUT_SEEN_S
    assert elsewhere() == ()
    here.cache.deployments.put(replace(deployment(), meta=meta("other-runtime", "x"), base=OTHER, rolling=True))
    assert elsewhere() == ("team/other",)


def test_one_idle_base_at_a_time_is_asked_to_yield() -> None:
    here = Here()
    here.observer.keep_standing(KEY, Standing(idle_since_unix_s=NOW - 60, devices=GPU))
    waking = Standing(lacks=GPU)
    assert here.observer.keep_standing(OTHER, waking) == KEY
    assert here.observer.keep_standing(OTHER, waking) is None
    observed = here.observer.base(KEY)
    assert observed is not None
    assert observed.yields_to == OTHER
    here.now += YIELD_PAUSE_S
    assert here.observer.keep_standing(OTHER, waking) == KEY


def test_a_bases_own_status_causes_no_new_summaries_of_its_adapters_and_a_change_of_its_terms_does() -> None:
    here = Here()
    here.adapter("a", minReplicas=2)
    (before,) = here.summaries()
    written = base(replicas=3)
    here.cache.bases.put(replace(written, meta=replace(written.meta, resource_version="2")))
    (same,) = here.summaries()
    assert same is before
    deleting = replace(written, meta=replace(written.meta, resource_version="3", deleting=True))
    here.cache.bases.put(deleting)
    (changed,) = here.summaries()
    assert (before.pinned_replicas, changed.pinned_replicas) == (2, 0)


async def test_the_summaries_of_a_base_are_made_in_pieces_before_its_plan() -> None:
    here = Here()
    for name in ("a", "b", "c"):
        here.adapter(name)
    made: list[int] = []

    async def turn() -> None:
        made.append(len(here.observer._summaries))

    await here.observer.prepare(KEY, turn)
    assert made == [0, 1, 2]
    known = {uid: summary for uid, (_, _, summary) in here.observer._summaries.items()}
    assert all(known[f"{name}-uid"] is summary for name, summary in zip("abc", here.summaries(), strict=True))
