"""Model names, permissions and adapter states, resolved by the route table alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes import digest_of
from gateway_world import adapter_object, api_key, base_object, condition, failed_status, ready_status
from hypothesis import given
from hypothesis import strategies as st
from pods import group_objects, group_pods, owner_objects, pod_object

from lorapool_api.openai import ApiError, ModelNotFoundError
from lorapool_api.trust.ownership import Owners
from lorapool_gateway.routing.objects import (
    Endpoint,
    ObjectRef,
    RuntimeState,
    adapter_route,
    base_route,
    pod_owner,
    runtime_pod,
    workload,
)
from lorapool_gateway.routing.pick import candidates
from lorapool_gateway.routing.routes import Pending, RouteTable, RuntimeReplica, Target
from lorapool_gateway.routing.table_builder import owned_pods

ALL = api_key("all")
OLD, NEW = "2025-01-01T00:00:00Z", "2026-06-01T00:00:00Z"


def table(*raws: dict[str, Any], bases: list[dict[str, Any]] | None = None, **more: Any) -> RouteTable:
    return RouteTable.of(
        [base_route(raw) for raw in (bases if bases is not None else [base_object()])],
        [adapter_route(raw) for raw in raws],
        more.get("replicas", {}),
    )


def target(found: Target | Pending) -> Target:
    assert isinstance(found, Target)
    return found


def test_a_name_shared_by_two_visible_objects_is_not_found_but_each_full_name_is() -> None:
    routes = table(adapter_object("x", "a", base_namespace="demo"), adapter_object("x", "b", base_namespace="demo"),
                   bases=[base_object(access={"namespaces": ["a", "b"]})])  # fmt: skip
    with pytest.raises(ModelNotFoundError):
        routes.find("x", ALL)
    assert routes.find("a/x", ALL).ref == ("a", "x")
    assert routes.find("x", api_key("k", "b")).ref == ("b", "x")


def test_an_alias_leads_to_the_object_that_the_operator_granted_it_to_however_old_another_is() -> None:
    routes = table(
        adapter_object("x", alias="best", created=NEW),
        adapter_object("y", alias="best", alias_granted=False, created=OLD),
    )
    assert routes.find("best", ALL).ref == ("demo", "x")
    with pytest.raises(ModelNotFoundError):
        table(adapter_object("x", alias="best", alias_granted=False)).find("best", ALL)


SHARED = base_object("llama", "team-b", access={"namespaces": ["team-a"]}, servedName="gpt-prod")
VICTIM = adapter_object("support-v7", "team-b", base="llama", alias="support", created=OLD)


def guest(name: str, **more: Any) -> dict[str, Any]:
    return adapter_object(name, "team-a", base="llama", base_namespace="team-b", created=NEW, **more)


def test_an_object_named_like_the_alias_or_served_name_of_another_does_not_take_its_requests() -> None:
    routes = table(VICTIM, guest("support"), guest("gpt-prod"), bases=[SHARED])
    for key in (ALL, api_key("k", "team-a,team-b")):
        assert routes.find("support", key).ref == ("team-b", "support-v7")
        assert routes.find("gpt-prod", key).ref == ("team-b", "llama")
        assert routes.find("team-a/support", key).ref == ("team-a", "support")
    assert routes.find("support", api_key("k", "team-a")).ref == ("team-a", "support")  # a key that sees it alone


def test_a_name_with_a_slash_is_a_full_name_and_no_alias() -> None:
    squatter = guest("x", alias="team-b/support-v7")
    routes = table(VICTIM, squatter, bases=[SHARED])
    assert routes.find("team-b/support-v7", ALL).ref == ("team-b", "support-v7")
    with pytest.raises(ModelNotFoundError):
        table(squatter, bases=[SHARED]).find("team-b/support-v7", ALL)


def test_a_short_name_of_several_models_is_refused_with_their_full_names_to_a_key_that_sees_them_only() -> None:
    routes = table(VICTIM, guest("support-v7"), bases=[SHARED])
    with pytest.raises(ModelNotFoundError) as caught:
        routes.find("support-v7", ALL)
    assert "`team-a/support-v7`, `team-b/support-v7`" in caught.value.message
    assert caught.value.code == "model_not_found"
    assert routes.find("support-v7", api_key("k", "team-b")).ref == ("team-b", "support-v7")
    with pytest.raises(ModelNotFoundError) as caught:
        routes.find("support-v7", api_key("k", "team-c"))
    assert caught.value.message == ModelNotFoundError("support-v7").message


def test_a_keys_default_namespace_decides_what_a_short_name_means() -> None:
    routes = table(VICTIM, guest("support-v7"), guest("only-a"), bases=[SHARED])
    for namespace in ("team-a", "team-b"):
        key = api_key("k", "team-a,team-b", default_namespace=namespace)
        assert routes.find("support-v7", key).ref == (namespace, "support-v7")
        assert routes.find("only-a", key).ref == ("team-a", "only-a")


def test_an_adapter_that_its_base_does_not_admit_makes_no_name_ambiguous() -> None:
    stranger = adapter_object("support-v7", "team-c", base="llama", base_namespace="team-b")
    assert table(VICTIM, stranger, bases=[SHARED]).find("support-v7", ALL).ref == ("team-b", "support-v7")


def test_a_foreign_base_that_does_not_exist_and_one_that_admits_no_guest_are_the_same() -> None:
    key, found = api_key("k", "team-a"), set()
    for name in ("secret-base", "no-such-base"):
        probe = adapter_object("probe", "team-a", base=name, base_namespace="finance")
        routes = table(probe, bases=[base_object("secret-base", "finance")])
        with pytest.raises(ApiError) as caught:
            routes.resolve("team-a/probe", key, 0)
        found.add((caught.value.status, caught.value.code, caught.value.message))
        assert routes.visible(key) == []
    assert len(found) == 1


def test_an_alias_of_an_unseen_tenant_takes_nothing_away() -> None:
    bases = [base_object(), base_object("tiny", "evil")]
    routes = table(
        adapter_object("x", "evil", alias="best", created=OLD), adapter_object("y", alias="best"), bases=bases
    )
    assert routes.find("best", api_key("k", "demo")).ref == ("demo", "y")


def test_an_adapter_named_as_its_base_is_ambiguous_and_never_answered_by_the_base() -> None:
    routes = table(adapter_object("tiny"))
    with pytest.raises(ModelNotFoundError):
        routes.find("tiny", ALL)


def test_a_base_of_another_namespace_must_list_ours() -> None:
    stranger = adapter_object("x", "b", base_namespace="demo")
    with pytest.raises(ModelNotFoundError):
        table(stranger).resolve("b/x", ALL, 0)
    granted = table(stranger, bases=[base_object(access={"namespaces": ["b"]})])
    assert target(granted.resolve("b/x", ALL, 0)).identity == f"b/x@{digest_of('x')}"


def test_the_target_is_pinned_to_uid_and_digest() -> None:
    found = target(table(adapter_object("x")).resolve("x", ALL, 0))
    assert found.header == f"uid-demo-x@{digest_of('x')}"
    assert found.identity == f"demo/x@{digest_of('x')}"
    assert target(table().resolve("demo/tiny", ALL, 0)).header == "base"


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"status": failed_status("RankTooHigh", "m")}, 422, "rank_too_high"),
        ({"status": failed_status("SourceNotFound", "m")}, 422, "source_not_found"),
        ({"status": failed_status("ReasonOfNextYear", "m")}, 422, "adapter_failed"),
        ({"suspend": True}, 422, "adapter_suspended"),
        ({"base": "gone"}, 503, "base_not_found"),
    ],
)
def test_terminal_states_are_errors_at_once(changes: dict[str, Any], status: int, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        table(adapter_object("x", **changes)).resolve("x", ALL, 0)
    assert (caught.value.status, caught.value.code) == (status, code)


def test_a_failure_of_an_older_spec_no_longer_counts() -> None:
    fixed = adapter_object("x", generation=2, status=failed_status("RankTooHigh", "m"))
    assert isinstance(table(fixed).resolve("x", ALL, 0), Pending)


def test_a_source_that_is_known_to_be_down_is_refused_at_once_until_its_next_check() -> None:
    status = failed_status("RateLimited", "m", retryAt="1970-01-01T00:01:40Z")
    routes = table(adapter_object("x", status=status))
    with pytest.raises(ApiError) as caught:
        routes.resolve("x", ALL, 70.0)
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, "rate_limited", 30.0)
    checked_again = routes.resolve("x", ALL, 100.0)
    assert isinstance(checked_again, Pending)
    assert (checked_again.late.status, checked_again.late.code) == (503, "rate_limited")


@pytest.mark.parametrize(
    "failing",
    [condition("SourceResolved", "False", "SourceNotFound", "m"), condition("Ready", "False", "ProfileNotFound", "m")],
    ids=["source", "profile"],
)
def test_a_base_whose_pods_cannot_start_refuses_at_once_unless_a_replica_serves(failing: dict[str, Any]) -> None:
    base = base_object()
    base["status"] = {"observedGeneration": 1, "conditions": [failing]}
    for model in ("tiny", "x"):
        with pytest.raises(ApiError) as caught:
            table(adapter_object("x"), bases=[base]).resolve(model, ALL, 0)
        assert (caught.value.status, caught.value.code) == (503, "base_unavailable")
        assert caught.value.retry_after_s
        serving = table(adapter_object("x"), bases=[base], replicas={ObjectRef("demo", "tiny"): (replica("a"),)})
        assert isinstance(serving.resolve(model, ALL, 0), Target)
        changed = {**base, "metadata": {**base["metadata"], "generation": 2}}
        assert isinstance(table(adapter_object("x"), bases=[changed]).resolve(model, ALL, 0), Target)


def test_a_failed_rollout_keeps_the_old_digest_and_the_source_it_came_from() -> None:
    status = ready_status(
        digest_of("old"),
        sourceUri="hf://org/old",
        revision="abc",
        failure={"reason": "CorruptArtifact", "message": "m"},
    )
    found = target(table(adapter_object("x", generation=2, status=status)).resolve("x", ALL, 0))
    descriptor = found.descriptor()
    assert found.digest == digest_of("old")
    assert descriptor is not None
    assert (descriptor.source.uri, descriptor.source.revision) == ("hf://org/old", "abc")


def test_awaiting_a_runtime_asks_for_a_wake() -> None:
    status = {"conditions": [condition("Resolved", "Unknown", "AwaitingRuntime")]}
    found = table(adapter_object("x", status=status)).resolve("x", ALL, 0)
    assert isinstance(found, Pending)
    assert found.wake


def test_usage_written_to_the_status_changes_nothing_a_request_could_notice() -> None:
    before = adapter_object("x")
    after = adapter_object("x")
    after["status"] = {**after["status"], "usage": {"requests": 7}, "lastUsed": NEW}
    after["metadata"]["resourceVersion"] = "2"
    assert adapter_route(before) == adapter_route(after)


@given(
    st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
)
def test_a_strange_object_is_refused_with_an_error_that_the_watch_knows(spec: dict[str, Any]) -> None:
    raw = adapter_object("x")
    raw["spec"] = spec
    try:
        adapter_route(raw)
    except (ValueError, KeyError, TypeError, AttributeError):
        return


def endpoint(pod: str, uid: str = "base-demo-tiny", **more: Any) -> Endpoint:
    made = Endpoint(ObjectRef("demo", "tiny"), uid, f"uid-{pod}", pod, "http://x", ready=True, terminating=False)
    return replace(made, **more)


def test_a_pod_becomes_an_endpoint_at_its_port_named_http() -> None:
    found = [
        runtime_pod(pod_object(8000, name="a", ip="10.0.0.1")),
        runtime_pod(pod_object(8000, name="b", ip="fd00::1", ready=False, terminating=True)),
    ]
    assert [pod and (pod.endpoint.url, pod.endpoint.ready, pod.endpoint.terminating) for pod in found] == [
        ("http://10.0.0.1:8000", True, False),
        ("http://[fd00::1]:8000", False, True),
    ]
    assert runtime_pod(pod_object(8000, ip="")) is None  # not placed yet


def owned(*pods: dict[str, Any], bases: tuple[dict[str, Any], ...] = (base_object(),)) -> list[str]:
    deployment_raw, replica_set_raw = owner_objects()
    groups, *stateful_sets = group_objects()
    sets = [pod_owner(raw) for raw in (replica_set_raw, *stateful_sets)]
    owners = Owners.of(sets, [workload(raw) for raw in (deployment_raw, groups)])
    routes = RouteTable.of([base_route(raw) for raw in bases], [], {})
    parsed = [pod for raw in pods if (pod := runtime_pod(raw)) is not None]
    return [pod.pod_name for pod in owned_pods(parsed, owners, routes.bases)]


def test_a_pod_serves_a_base_only_if_its_labels_and_each_of_its_owners_lead_to_that_very_base() -> None:
    other = {"bases": (base_object(), base_object("other"))}
    assert owned(pod_object(1)) == ["pod-1"]
    assert owned(pod_object(1, owner="")) == []  # labels alone, which any user may write
    assert owned(pod_object(1, owner="rs-forged")) == []
    assert owned(pod_object(1, namespace="evil"), bases=(base_object(), base_object(namespace="evil"))) == []
    assert owned(pod_object(1, base="other"), **other) == []
    assert owned(pod_object(1, base="other", base_uid="base-demo-other", owner="rs-base-demo-tiny"), **other) == []
    assert owned(pod_object(1, base_uid="base-demo-other"), **other) == []
    assert owned(pod_object(1), bases=()) == []


def test_of_a_group_of_pods_the_leader_serves_and_no_worker_does() -> None:
    leader, worker = group_pods(1)
    assert owned(leader, worker) == ["tiny-runtime-0"]
    worker["metadata"]["ownerReferences"] = leader["metadata"]["ownerReferences"]
    assert len(owned(leader, worker)) == 2  # the owner is what decides
    assert owned(leader, bases=()) == []


def test_a_recreated_base_never_adopts_the_pods_of_the_one_before() -> None:
    ref = ObjectRef("demo", "tiny")
    routes = table(replicas={ref: (RuntimeReplica(endpoint("a", "an-older-uid"), proven=True),)})
    assert routes.replicas_of(routes.bases[ref]) == ()


def replica(pod: str, **state: Any) -> RuntimeReplica:
    values = {"boot_id": "b", "ready": True, "draining": False, "in_flight": 0, "loaded": frozenset(), **state}
    return RuntimeReplica(endpoint(pod), RuntimeState(**values), proven=True)


def test_among_replicas_that_hold_the_adapter_the_least_busy_comes_first_and_no_draining_one_at_all() -> None:
    found = target(table(adapter_object("x")).resolve("x", ALL, 0))
    here = frozenset({tuple(found.key or ())})
    assert found.adapter is not None
    found = replace(found, adapter=replace(found.adapter, preferred_replicas=3))
    order = candidates(
        found,
        [
            replica("cold"),
            replica("busy", loaded=here, in_flight=9),
            replica("free", loaded=here, in_flight=1),
            replica("draining", loaded=here, draining=True),
            replica("starting", ready=False),
        ],
        {},
    )
    assert [item.endpoint.pod_name for item in order] == ["free", "busy", "cold"]


def test_requests_to_the_base_go_to_the_least_busy_replica_by_what_this_gateway_knows_best() -> None:
    found = target(table().resolve("tiny", ALL, 0))
    order = candidates(found, [replica("a", in_flight=1), replica("b")], {"uid-b": 3})
    assert [item.endpoint.pod_name for item in order] == ["a", "b"]


def test_a_runtimes_own_report_overrides_its_pods_late_status() -> None:
    late = endpoint("p", ready=False)
    state = RuntimeState("b", ready=True, draining=False, in_flight=0, loaded=frozenset())
    assert RuntimeReplica(late, state, proven=True).usable
    assert not RuntimeReplica(late, proven=True).usable


def test_a_pod_that_has_not_proved_itself_gets_no_request_however_ready_it_is() -> None:
    assert not RuntimeReplica(endpoint("p")).usable
    assert RuntimeReplica(endpoint("p"), proven=True).usable
