"""The quotas of the chart reach the gateways, which read them; what is no quota is refused by Helm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chart_kit import environment, of_kind, pod_of, refusal, render

from lorapool_api.quota_protocol import Meter
from lorapool_gateway.quotas.limits import QuotaFile
from lorapool_gateway.settings import read_settings


def test_gateways_read_what_the_chart_writes(tmp_path: Path) -> None:
    most = 2**53 - 1
    quotas = {
        "namespaces": {"*": {"requestsPerMinute": 7, "moneyPerMonth": "25.50 EUR"}},
        "models": {"a/x": {"tokensPerMonth": most}},
    }
    manifests = render({"quotas": quotas})
    settings = read_settings(environment(manifests, "gateway"))
    assert settings.quota_file is not None
    pod = pod_of(of_kind(manifests, "Deployment")["lorapool-gateway"])
    assert pod is not None
    mounts = {item["mountPath"]: item["name"] for item in pod["spec"]["containers"][0]["volumeMounts"]}
    volumes = {item["name"]: item for item in pod["spec"]["volumes"]}
    config_map = volumes[mounts[str(settings.quota_file.parent)]]["configMap"]["name"]
    file = tmp_path / settings.quota_file.name
    file.write_text(of_kind(manifests, "ConfigMap")[config_map]["data"][file.name])
    assert QuotaFile(file).of("b", "a/x") == [
        ("project/b", ((Meter.REQUESTS_PER_MINUTE, 7), (Meter.MONEY_PER_MONTH, 25_500_000_000))),
        ("model/a/x", ((Meter.TOKENS_PER_MONTH, most),)),
    ]


@pytest.mark.parametrize("value", [0, -1, 1.5, 2**53, "7", True])
def test_helm_refuses_what_is_no_quota(value: Any) -> None:
    assert "tokensPerMinute" in refusal({"quotas": {"namespaces": {"a": {"tokensPerMinute": value}}}})


@pytest.mark.parametrize(
    "value", [0, 25.5, "-1 EUR", "25.50", "NaN EUR", f"{2**63} EUR", "25.50 eur", "25 XYZ", "0.0 EUR"]
)
def test_helm_refuses_what_is_no_budget_of_money(value: Any) -> None:
    assert "moneyPerMonth" in refusal({"quotas": {"models": {"a/x": {"moneyPerMonth": value}}}})
