"""A profile that contradicts itself starts no pod, and each base that uses it says what to correct."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from base_world import IMAGE, base, condition, deployment, message, plan, pod, runtime, world
from profile_kit import CONSISTENT, CONTRADICTIONS, gpus, two_nodes

from lorapool_api.common import BaseCondition, Reason
from lorapool_operator.decisions.profile_checks import profile_problem
from lorapool_operator.world.profiles import NO_IMAGE, RuntimeProfile


def profile(fields: dict[str, Any]) -> RuntimeProfile:
    return RuntimeProfile.model_validate(fields)


@pytest.mark.parametrize("wrong", CONTRADICTIONS)
def test_a_contradiction_is_a_condition_with_the_remedy_and_makes_no_pod(wrong: str) -> None:
    fields, reason, words = CONTRADICTIONS[wrong]
    made = plan(world(profile=profile(fields)))
    assert (made.children, made.scale_to) == ((), 1)
    for kind in (BaseCondition.READY, BaseCondition.RUNTIME_AVAILABLE, BaseCondition.PROGRESSING):
        assert condition(made, kind) == ("False", reason)
    assert condition(made, BaseCondition.STALLED) == ("True", reason)
    assert message(made, BaseCondition.READY).startswith("The runtime profile 'default' cannot be used: ")
    assert words in message(made, BaseCondition.READY)


@pytest.mark.parametrize("right", CONSISTENT)
def test_a_consistent_profile_is_accepted(right: str) -> None:
    assert profile_problem(profile(CONSISTENT[right]), IMAGE, "tiny") is None
    assert plan(world(profile=profile(CONSISTENT[right]))).children


def test_pods_that_run_outlive_a_profile_that_became_contradictory() -> None:
    fields, reason, _ = CONTRADICTIONS["no shared memory"]
    made = plan(world(profile=profile(fields), pods=(pod(),), runtimes=(runtime(),), workload=deployment()))
    assert (made.children, made.remove) == ((), ())
    assert condition(made, BaseCondition.READY) == ("True", Reason.DEGRADED)
    assert condition(made, BaseCondition.PROGRESSING) == ("False", reason)


@pytest.mark.parametrize("name", ["a" * 41, "llama-3.1"])
def test_a_name_that_no_group_can_have_is_a_condition(name: str) -> None:
    of = base()
    made = plan(world(replace(of, meta=replace(of.meta, name=name)), profile=profile(two_nodes())))
    assert condition(made, BaseCondition.READY) == ("False", Reason.INVALID_PROFILE)
    assert "has 40 characters at most and no dot" in message(made, BaseCondition.READY)
    assert profile_problem(profile(two_nodes()), IMAGE, "a" * 40) is None
    assert profile_problem(profile(gpus(1)), IMAGE, name) is None


def test_the_engine_vllm_needs_an_image_of_its_own() -> None:
    made = plan(world(profile=profile(gpus(1)), image=NO_IMAGE))
    assert condition(made, BaseCondition.READY) == ("False", Reason.INVALID_PROFILE)
    assert "set image.runtimeVllm.repository of the chart" in message(made, BaseCondition.READY)
    assert profile_problem(profile(gpus(1, image="own:1")), NO_IMAGE, "tiny") is None
    assert profile_problem(RuntimeProfile(), NO_IMAGE, "tiny") is None
