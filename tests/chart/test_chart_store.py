"""The store in the chart: off by default; on, every part knows it, and rights grow by what it needs."""

from __future__ import annotations

from typing import Any

import pytest
from chart_kit import environment, grants, of_kind, pod_of, render, restricted_violations

from lorapool_gateway import settings as gateway_settings
from lorapool_operator import settings as operator_settings
from lorapool_store import settings as store_settings

ON: dict[str, Any] = {"store": {"enabled": True}}
URL = "https://lorapool-store.lorapool-system.svc:8000"


def test_without_the_store_no_object_right_or_setting_of_it_is_there() -> None:
    manifests = render()
    assert not [item for item in manifests if item["metadata"]["name"].endswith(("-store", "-store-token"))]
    assert gateway_settings.read_settings(environment(manifests, "gateway")).store_url == ""
    assert not [line for lines in grants(manifests).values() for line in lines if "create patch finetunejobs" in line]


def test_gateway_operator_and_store_start_with_what_the_chart_gives() -> None:
    manifests = render(ON)
    gateway = gateway_settings.read_settings(environment(manifests, "gateway"))
    operator = operator_settings.read_settings(environment(manifests, "operator"))
    store = store_settings.read_settings(environment(manifests, "store"))
    assert gateway.store_url == operator.store_url == URL
    assert operator.store_tls_secret == "lorapool-store-tls"
    defaults = {name: field.default for name, field in type(store).model_fields.items()}
    assert {name for name, value in defaults.items() if getattr(store, name) != value} == {"tls_dir"}
    for component, settings in (("gateway", gateway), ("operator", operator)):
        pod = pod_of(of_kind(manifests, "Deployment")[f"lorapool-{component}"])
        assert pod is not None
        mounts = {item["mountPath"]: item["name"] for item in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts[str(settings.store_token_file.parent)] == "store-token"


def test_the_stores_pod_is_restricted_and_gets_no_token_of_the_api_server() -> None:
    pod = pod_of(of_kind(render(ON), "Deployment")["lorapool-store"])
    assert pod is not None
    assert restricted_violations(pod["spec"]) == []
    assert pod["spec"]["automountServiceAccountToken"] is False


def test_rights_grow_by_jobs_and_one_secret_by_name() -> None:
    before, after = grants(render()), grants(render(ON))
    grown = {name: sorted(set(after[name]) - set(before.get(name, []))) for name in after}
    assert grown["lorapool-gateway"] == [
        "in lorapool-system: delete loraadapters.lorapool.dev",
        "in lorapool-system: get list watch create patch finetunejobs.lorapool.dev",
    ]
    assert grown["lorapool-operator"] == ["in lorapool-system: get create patch secrets named lorapool-store-tls"]


@pytest.mark.parametrize(
    ("values", "claims"),
    [
        ({}, ["lorapool-store"]),
        ({"persistence": {"existingClaim": "mine"}}, []),
        ({"persistence": {"enabled": False}}, []),
        ({"location": "s3://bucket/files"}, []),
    ],
)
def test_a_volume_is_made_for_a_folder_alone(values: dict[str, Any], claims: list[str]) -> None:
    found = of_kind(render({"store": {"enabled": True, **values}}), "PersistentVolumeClaim")
    assert [name for name in found if name != "lorapool-ledger"] == claims


def test_without_persistence_the_objects_live_as_long_as_the_pod() -> None:
    manifests = render({"store": {"enabled": True, "persistence": {"enabled": False}}})
    pod = pod_of(of_kind(manifests, "Deployment")["lorapool-store"])
    assert pod is not None
    assert {"name": "data", "emptyDir": {}} in pod["spec"]["volumes"]


def test_without_internal_tls_the_store_serves_plain_http() -> None:
    manifests = render({**ON, "internalTLS": {"enabled": False}})
    assert environment(manifests, "gateway")["LORAPOOL_GATEWAY_STORE_URL"] == URL.replace("https", "http")
    assert "LORAPOOL_STORE_TLS_DIR" not in environment(manifests, "store")
    assert "LORAPOOL_OPERATOR_STORE_TLS_SECRET" not in environment(manifests, "operator")


def test_only_parts_of_the_release_and_pods_of_bases_reach_the_store() -> None:
    policy = of_kind(render(ON), "NetworkPolicy")["lorapool-store"]["spec"]
    [objects, metrics] = policy["ingress"]
    assert [
        peer["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/component") for peer in objects["from"]
    ] == [
        "gateway",
        "operator",
        None,
    ]
    assert metrics["ports"] == [{"protocol": "TCP", "port": 9090}]
    assert len(policy["egress"]) == 1  # names alone
