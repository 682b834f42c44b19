"""The ledger in the chart: on by default, with rights to read alone, and gone without a trace when it is off."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from chart_kit import environment, grants, of_kind, pod_of, refusal, render, restricted_violations

from lorapool_gateway import settings as gateway_settings
from lorapool_ledger import settings as ledger_settings
from lorapool_ledger.billing.prices import LineItem, parse_prices
from lorapool_operator import settings as operator_settings

OFF: dict[str, Any] = {"ledger": {"enabled": False}}
POSTGRES: dict[str, Any] = {"ledger": {"replicas": 2, "database": {"existingSecret": "pg", "key": "uri"}}}
URL = "https://lorapool-ledger.lorapool-system.svc:8000"
NAME = "lorapool-ledger"


def pod_spec(values: dict[str, Any] | None = None) -> dict[str, Any]:
    pod = pod_of(of_kind(render(values), "Deployment")[NAME])
    assert pod is not None
    return dict(pod["spec"])


def test_without_the_ledger_no_object_right_or_setting_of_it_is_there() -> None:
    manifests = render(OFF)
    assert not [item for item in manifests if "ledger" in item["metadata"]["name"]]
    assert "ledger" not in str([item for item in manifests if item["kind"] not in ("CustomResourceDefinition",)])
    gateway = gateway_settings.read_settings(environment(manifests, "gateway"))
    operator = operator_settings.read_settings(environment(manifests, "operator"))
    assert (gateway.ledger_url, gateway.journal_dir) == ("", None)
    assert (operator.runtime_usage, operator.ledger_tls_secret) == (False, "")
    spec = pod_of(of_kind(manifests, "Deployment")["lorapool-gateway"])
    assert "journal" not in str(spec)


def test_gateway_operator_and_ledger_start_with_what_the_chart_gives() -> None:
    manifests = render({"watchNamespaces": ["team-a", "team-b"]})
    gateway = gateway_settings.read_settings(environment(manifests, "gateway"))
    operator = operator_settings.read_settings(environment(manifests, "operator"))
    ledger = ledger_settings.read_settings(environment(manifests, "ledger"))
    assert gateway.ledger_url == URL
    assert (operator.runtime_usage, operator.ledger_tls_secret) == (True, "lorapool-ledger-tls")
    assert ledger.namespaces == {"team-a", "team-b"}
    assert ledger.keys_namespace == gateway.keys_namespace
    own = {"namespaces", "keys_namespace", "tls_dir"}
    defaults = {name: field.default for name, field in type(ledger).model_fields.items()}
    assert {name for name, value in defaults.items() if getattr(ledger, name) != value} == own
    pod = pod_of(of_kind(manifests, "Deployment")["lorapool-gateway"])
    assert pod is not None
    mounts = {item["mountPath"]: item["name"] for item in pod["spec"]["containers"][0]["volumeMounts"]}
    assert mounts[str(gateway.ledger_token_file.parent)] == "ledger-token"
    assert mounts[str(gateway.journal_dir)] == "journal"
    [journal] = [item for item in pod["spec"]["volumes"] if item["name"] == "journal"]
    assert set(journal) == {"name", "emptyDir"}


def test_the_ledgers_files_are_mounted_where_it_looks() -> None:
    sinks = {"entries": [{"name": "m", "type": "lago", "url": "https://lago.example"}], "existingSecret": "sinks"}
    manifests = render({"ledger": {"sinks": sinks}})
    ledger = ledger_settings.read_settings(environment(manifests, "ledger"))
    spec = pod_spec({"ledger": {"sinks": sinks}})
    mounts = {item["mountPath"]: item["name"] for item in spec["containers"][0]["volumeMounts"]}
    assert mounts[str(ledger.token_file.parent)] == "ledger-token"
    assert mounts[str(ledger.master_token_file.parent)] == "runtime-token"
    assert mounts[str(ledger.internal_ca_file.parent)] == "internal-ca"
    assert mounts[str(ledger.tls_dir)] == "tls"
    assert mounts[str(ledger.bill_dir)] == "bill"
    assert mounts[str(ledger.sink_secrets_dir)] == "sink-secrets"
    assert mounts["/" + ledger.database_url.removeprefix("sqlite:////").partition("/")[0]] == "data"
    assert restricted_violations(spec) == []
    ports = {port["name"]: port["containerPort"] for port in spec["containers"][0]["ports"]}
    assert ports == {"api": ledger.api_port, "metrics": ledger.metrics_port}


def test_rights_of_the_ledger_are_to_read() -> None:
    for values in ({}, {"scope": "cluster"}, {"tuning": {"enabled": True}}):
        lines = grants(render(values))[NAME]
        assert {line.partition(": ")[2].rsplit(" ", 1)[0] for line in lines} == {"list watch"}
    assert any("finetunejobs" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "claims"),
    [
        ({}, [NAME]),
        ({"ledger": {"persistence": {"existingClaim": "mine"}}}, []),
        ({"ledger": {"persistence": {"enabled": False}}}, []),
        (POSTGRES, []),
    ],
)
def test_a_volume_is_made_for_sqlite_alone_and_kept(values: dict[str, Any], claims: list[str]) -> None:
    found = of_kind(render(values), "PersistentVolumeClaim")
    assert list(found) == claims
    for claim in found.values():
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert ("data" in {item["name"] for item in pod_spec(values)["volumes"]}) == (values != POSTGRES)


def test_one_process_writes_the_file_and_two_share_postgresql() -> None:
    [file, shared] = (of_kind(render(values), "Deployment")[NAME]["spec"] for values in ({}, POSTGRES))
    assert (file["replicas"], file["strategy"]) == (1, {"type": "Recreate"})
    assert (shared["replicas"], shared["strategy"]["type"]) == (2, "RollingUpdate")
    assert NAME not in of_kind(render(), "PodDisruptionBudget")
    assert NAME in of_kind(render(POSTGRES), "PodDisruptionBudget")
    reference = {"secretKeyRef": {"name": "pg", "key": "uri"}}
    env = pod_spec(POSTGRES)["containers"][0]["env"]
    assert {"name": "LORAPOOL_LEDGER_DATABASE_URL", "valueFrom": reference} in env
    assert "needs PostgreSQL (ledger.database.existingSecret)" in refusal({"ledger": {"replicas": 2}})


def test_prices_and_sinks_reach_the_ledger_as_they_were_written() -> None:
    prices = {
        "entries": [{"effectiveFrom": "2026-11-01", "scope": "*", "currency": "EUR", "promptPerMillion": "0.10"}],
        "pods": [{"effectiveFrom": "2026-11-01", "profile": "*", "currency": "EUR", "podPerHour": 1.8}],
    }
    data = of_kind(render({"ledger": {"prices": prices}}), "ConfigMap")[NAME]["data"]
    found = {price.item: price.amount for price in parse_prices(data["prices.yaml"])}
    assert found == {LineItem.PROMPT: Decimal("0.10"), LineItem.POD: Decimal("1.8")}
    assert parse_prices(of_kind(render(), "ConfigMap")[NAME]["data"]["prices.yaml"]) == ()
    own = {"ledger": {"prices": {"existingConfigMap": "mine"}}}
    assert "prices.yaml" not in of_kind(render(own), "ConfigMap")[NAME]["data"]
    [bill] = [item for item in pod_spec(own)["volumes"] if item["name"] == "bill"]
    assert [source["configMap"]["name"] for source in bill["projected"]["sources"]] == [NAME, "mine"]


@pytest.mark.parametrize(
    "entry",
    [
        {"promptPerMillion": -1},
        {"promptPerMillion": "-1"},
        {"promptPerMillion": "NaN"},
        {"scope": "acme"},
        {"currency": "euro"},
        {"currency": "XYZ"},
        {"effectiveFrom": "soon"},
        {"perMillion": 1},
    ],
)
def test_the_schema_refuses_prices_that_the_ledger_would_refuse(entry: dict[str, Any]) -> None:
    whole = {"effectiveFrom": "2026-11-01", "scope": "*", "currency": "EUR", **entry}
    assert "ledger" in refusal({"ledger": {"prices": {"entries": [whole]}}})


def test_without_internal_tls_the_ledger_serves_plain_http() -> None:
    manifests = render({"internalTLS": {"enabled": False}})
    assert environment(manifests, "gateway")["LORAPOOL_GATEWAY_LEDGER_URL"] == URL.replace("https", "http")
    assert "LORAPOOL_LEDGER_TLS_DIR" not in environment(manifests, "ledger")
    assert "LORAPOOL_OPERATOR_LEDGER_TLS_SECRET" not in environment(manifests, "operator")
    [port] = of_kind(manifests, "Service")[NAME]["spec"]["ports"]
    assert port["appProtocol"] == "http"


def components(peers: list[dict[str, Any]]) -> list[str]:
    return [
        peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component", "other") for peer in peers
    ]


def test_gateways_reach_the_ledger_and_it_reaches_runtimes_and_what_it_needs() -> None:
    policies = of_kind(render(), "NetworkPolicy")
    [api, metrics] = policies[NAME]["spec"]["ingress"]
    assert components(api["from"]) == ["gateway"]
    assert metrics["ports"] == [{"protocol": "TCP", "port": 9090}]
    assert any("ledger" in components(rule["to"]) for rule in policies["lorapool-gateway"]["spec"]["egress"])
    ports = [rule["ports"][0]["port"] for rule in policies[NAME]["spec"]["egress"]]
    assert ports == [53, 443, 8000]  # names, the API server, runtimes
    sinks = {"entries": [{"name": "m", "type": "cloudevents", "url": "https://m.example"}]}
    more = of_kind(render({"ledger": {**POSTGRES["ledger"], "sinks": sinks}}), "NetworkPolicy")[NAME]["spec"]["egress"]
    assert [rule["ports"][0]["port"] for rule in more] == [53, 443, 8000, 5432, 443]


def test_the_console_is_exposed_by_ingress_or_route_when_that_is_wanted() -> None:
    assert of_kind(render(), "Ingress") == of_kind(render(), "HTTPRoute") == {}
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}
    values = {
        "ledger": {
            "ingress": {"enabled": True, "hosts": [{"host": "usage.example.com"}]},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
        },
        "networkPolicy": {"consoleFrom": [peer]},
    }
    manifests = render(values)
    [rule] = of_kind(manifests, "Ingress")[NAME]["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": NAME, "port": {"name": "api"}}
    [route] = of_kind(manifests, "HTTPRoute")[NAME]["spec"]["rules"]
    assert (route["backendRefs"], route["matches"][0]["path"]["value"]) == ([{"name": NAME, "port": 8000}], "/console")
    assert peer in of_kind(manifests, "NetworkPolicy")[NAME]["spec"]["ingress"][0]["from"]
    assert "ledger.ingress.enabled needs at least one entry" in refusal({"ledger": {"ingress": {"enabled": True}}})
    assert "ledger.httpRoute.enabled needs" in refusal({"ledger": {"httpRoute": {"enabled": True}}})


def test_prometheus_finds_the_ledger() -> None:
    manifests = render({"metrics": {"serviceMonitor": {"enabled": True}}})
    assert {"lorapool-operator", "lorapool-gateway", NAME} == set(of_kind(manifests, "ServiceMonitor"))
    off = render({"metrics": {"serviceMonitor": {"enabled": True}}, **OFF})
    assert NAME not in of_kind(off, "ServiceMonitor")
