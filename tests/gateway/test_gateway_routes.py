"""Model names, permissions and adapter states, resolved by the route table alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes import digest_of
from gateway_world import adapter_object, api_key, base_object, condition, failed_status, ready_status
from hypothesis import given
from hypothesis import strategies as st

from lorapool_api.openai import ApiError, ModelNotFoundError
from lorapool_gateway.routing.objects import Endpoint, ObjectRef, RuntimeState, adapter_route, base_route, endpoints
from lorapool_gateway.routing.pick import candidates
from lorapool_gateway.routing.routes import Pending, RouteTable, RuntimeReplica, Target
from lorapool_gateway.routing.table_builder import merge_endpoints

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


@pytest.mark.parametrize("swapped", [False, True])
def test_the_older_object_keeps_an_alias(swapped: bool) -> None:
    pair = [adapter_object("x", alias="best", created=NEW), adapter_object("y", alias="best", created=OLD)]
    routes = table(*(reversed(pair) if swapped else pair))
    assert routes.find("best", ALL).ref == ("demo", "y")


def test_an_alias_never_hides_the_name_of_another_object() -> None:
    routes = table(adapter_object("x", alias="y", created=OLD), adapter_object("y", created=NEW))
    assert routes.find("y", ALL).ref == ("demo", "y")


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


def slice_object(*pods: tuple[str, dict[str, bool]], uid: str = "base-demo-tiny") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "demo",
            "name": "tiny-runtime-x",
            "labels": {"lorapool.dev/base": "tiny", "lorapool.dev/base-uid": uid},
        },
        "endpoints": [
            {"addresses": [f"10.0.0.{n}"], "conditions": conditions, "targetRef": {"uid": f"uid-{pod}", "name": pod}}
            for n, (pod, conditions) in enumerate(pods)
        ],
        "ports": [{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}],
    }


def test_an_endpoint_slice_becomes_pods_with_the_port_named_http() -> None:
    found = list(
        endpoints(slice_object(("a", {"ready": True}), ("b", {"ready": False, "terminating": True}), ("c", {})))
    )
    assert [(pod.pod_uid, pod.url, pod.ready, pod.terminating) for pod in found] == [
        ("uid-a", "http://10.0.0.0:8000", True, False),
        ("uid-b", "http://10.0.0.1:8000", False, True),
        ("uid-c", "http://10.0.0.2:8000", True, False),
    ]


def test_a_pod_in_two_slices_counts_once_and_as_ready_if_one_says_so() -> None:
    twice = [*endpoints(slice_object(("a", {"ready": False}))), *endpoints(slice_object(("a", {"ready": True})))]
    assert [pod.ready for pod in merge_endpoints(twice)] == [True]


def test_a_recreated_base_never_adopts_the_pods_of_the_one_before() -> None:
    ref = ObjectRef("demo", "tiny")
    pods = tuple(RuntimeReplica(pod) for pod in endpoints(slice_object(("a", {}), uid="an-older-uid")))
    routes = table(replicas={ref: pods})
    assert routes.replicas_of(routes.bases[ref]) == ()


def replica(pod: str, **state: Any) -> RuntimeReplica:
    endpoint = Endpoint(ObjectRef("demo", "tiny"), None, f"uid-{pod}", pod, "http://x", ready=True, terminating=False)
    values = {"boot_id": "b", "ready": True, "draining": False, "in_flight": 0, "loaded": frozenset(), **state}
    return RuntimeReplica(endpoint, RuntimeState(**values))


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


def test_a_runtimes_own_word_beats_a_late_endpoint_slice() -> None:
    late = Endpoint(ObjectRef("demo", "tiny"), None, "u", "p", "http://x", ready=False, terminating=False)
    state = RuntimeState("b", ready=True, draining=False, in_flight=0, loaded=frozenset())
    assert RuntimeReplica(late, state).usable
    assert not RuntimeReplica(late).usable
