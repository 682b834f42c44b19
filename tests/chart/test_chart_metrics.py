"""Dashboards and rules use metrics that the processes export, in PromQL that Prometheus accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from chart_kit import CHART, DASHBOARDS, dashboard_expressions, of_kind, panels, render, run

from lorapool_gateway.metrics import Metrics as GatewayMetrics
from lorapool_ledger.metrics import Metrics as LedgerMetrics
from lorapool_operator.metrics import Metrics as OperatorMetrics
from lorapool_operator.metrics import StateCollector
from lorapool_operator.tuning_metrics import TuningCollector
from lorapool_runtime.accounts.usage import UsageTracker
from lorapool_runtime.clock import Clock
from lorapool_runtime.metrics import Metrics as RuntimeMetrics
from lorapool_store.metrics import Metrics as StoreMetrics
from lorapool_trainer.serve.metrics import TrainerMetrics
from lorapool_trainer.serve.worker import Published

RULES = [CHART / "rules" / "recording.yaml", CHART / "rules" / "alerts.yaml"]
RULE_TEST = CHART / "rules" / "alerts_test.yaml"

TARGET_LABELS = {"instance", "job", "namespace", "pod", "node", "le"}
"""Labels that Prometheus adds, and the bound of a histogram's bucket."""

_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
_NAME = re.compile(r"(?<![\w:.$])([a-z_]\w*(?::\w+)*)(?=\s*(\{|\[|\s|\)|$))")
_SELECTOR = re.compile(r"([a-z_][\w:]*)\{([^}]*)\}")
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
_WORDS = {"sum", "max", "min", "by", "on", "or", "and", "unless", "group_left", "ignoring", "without", "bool", "offset"}


def exported() -> dict[str, set[str]]:
    """Label names of each sample that any process exports."""
    nothing = SimpleNamespace(
        bases=(),
        adapters=(),
        outcomes={},
        writes={},
        polls=0,
        poll_failures=0,
        ready_depth=lambda: 0,
        oldest_age_s=lambda: 0.0,
        waiting=lambda: 0,
        failures={},
        failing={},
    )
    empty = cast(Any, nothing)
    operator = OperatorMetrics().registry
    operator.register(
        StateCollector(empty, empty, empty, empty, empty, empty, leading=lambda: True, max_tracked_adapters=1)
    )
    operator.register(TuningCollector((), max_tracked_jobs=1))
    trainer = TrainerMetrics("ns/base", Published, lambda: 0).registry
    clock = Clock()
    runtime = RuntimeMetrics("ns/base", UsageTracker(tracked=1), clock)
    found: dict[str, set[str]] = {}
    ledger = LedgerMetrics().registry
    for registry in (GatewayMetrics().registry, operator, runtime._registry, trainer, StoreMetrics().registry, ledger):
        for collector in list(registry._collector_to_names):
            own = set(getattr(collector, "_labelnames", ()))
            for family in collector.collect():
                labels = own | set(getattr(family, "_labelnames", ()))
                for sample in family.samples:
                    labels |= set(sample.labels)
                for suffix in _SUFFIXES.get(family.type, ("",)):
                    found[family.name + suffix] = labels
    return found


def rules(files: Iterable[Path] = RULES) -> Iterator[dict[str, Any]]:
    for file in files:
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def expressions() -> Iterator[tuple[str, str]]:
    """Each expression and where it occurs."""
    yield from dashboard_expressions(base="ns/base", adapter="ns/a")
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]


def metrics_in(expr: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', '""', expr)
    bare = _GROUPING.sub(" ", bare)
    return {match[1] for match in _NAME.finditer(bare) if match[1] not in _WORDS}


def test_the_reading_of_expressions_finds_names_and_nothing_else() -> None:
    expr = (
        'histogram_quantile(0.9, sum by (le, base) (rate(a_b{x="c_d", y=~"5.."}[5m]))) or 0 * level:m:op and on (i) q'
    )

    assert metrics_in(expr) == {"a_b", "level:m:op", "q"}


def test_every_metric_of_an_expression_is_exported_or_recorded() -> None:
    known = set(exported()) | {rule["record"] for rule in rules() if "record" in rule}
    missing = {where: unknown for where, expr in expressions() if (unknown := metrics_in(expr) - known)}

    assert missing == {}


def test_every_label_of_an_expression_is_one_the_metric_has() -> None:
    known = exported()
    missing = {}
    for where, expr in expressions():
        for metric, matchers in _SELECTOR.findall(expr):
            if ":" in metric:
                continue  # the rule that records it has its labels
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', matchers)))
            if unknown := used - known[metric] - TARGET_LABELS:
                missing[f"{where}: {metric}"] = unknown
        names = [name for name in metrics_in(expr) if name in known]
        recorded = metrics_in(expr) - set(names)
        if recorded:
            continue
        there = set().union(*(known[name] for name in names)) | TARGET_LABELS
        for group in _GROUPING.findall(expr):
            if unknown := {label.strip() for label in group.split(",")} - {""} - there:
                missing[f"{where}: by"] = unknown
    assert missing == {}


def test_prometheus_parses_every_expression(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    entries = [{"record": f"check:{number}", "expr": expr} for number, (_, expr) in enumerate(expressions())]
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": entries}]}))

    result = run("promtool", "check", "rules", file)

    assert result.returncode == 0, result.stdout + result.stderr
    assert len(entries) > 80


def test_the_rules_are_valid_and_their_unit_tests_pass() -> None:
    checked = run("promtool", "check", "rules", "--lint-fatal", *RULES)
    tested = run("promtool", "test", "rules", RULE_TEST)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_rule_has_a_unit_test_that_makes_it_fire() -> None:
    tests = yaml.safe_load(RULE_TEST.read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    quiet = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if not case["exp_alerts"]}
    computed = " ".join(case["expr"] for test in tests for case in test.get("promql_expr_test", []))

    for rule in rules():
        if "alert" in rule:
            assert rule["alert"] in fired
    assert {rule["alert"] for rule in rules() if "alert" in rule} - quiet <= {"LorapoolOperatorErrors"}
    for rule in rules():
        if "record" in rule and not rule["record"].endswith(":rate5m"):
            assert rule["record"] in computed


def test_an_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert set(rule["annotations"]) == {"summary", "description"}
            assert rule["alert"].startswith("Lorapool")


def test_the_rules_in_the_manifest_are_those_of_the_files(tmp_path: Path) -> None:
    manifests = render({"metrics": {"prometheusRule": {"enabled": True}}})
    [manifest] = of_kind(manifests, "PrometheusRule").values()
    groups = {group["name"]: group for group in manifest["spec"]["groups"]}
    wanted = {group["name"]: group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]}

    assert groups == wanted
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump(manifest["spec"]))
    assert run("promtool", "check", "rules", file).returncode == 0


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_works_with_any_data_source_and_lays_its_panels_out_without_overlap(file: Path) -> None:
    board = json.loads(file.read_text())
    variables = {item["name"]: item for item in board["templating"]["list"]}

    assert variables["datasource"]["type"] == "datasource"
    assert board["uid"] == f"lorapool-{file.stem}"
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels(file):
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"


DASHBOARD_VARIABLES = [
    ("fleet", set()),
    ("base", {"base"}),
    ("adapter", {"base", "adapter"}),
    ("tuning", {"base"}),
    ("bill", set()),
]


@pytest.mark.parametrize(("name", "wanted"), DASHBOARD_VARIABLES)
def test_a_dashboards_variables_come_from_labels_that_exist(name: str, wanted: set[str]) -> None:
    board = json.loads((CHART / "dashboards" / f"{name}.json").read_text())
    queries = {item["name"]: item["definition"] for item in board["templating"]["list"] if item["type"] == "query"}
    known = exported()

    assert set(queries) == wanted
    for query in queries.values():
        match = re.fullmatch(r"label_values\((\w+)(?:\{[^}]*\})?, (\w+)\)", query)
        assert match is not None, query
        assert match[2] in known[match[1]]
