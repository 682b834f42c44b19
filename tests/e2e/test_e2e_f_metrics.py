"""Metrics of all three processes, the dashboards against the real Prometheus, and series that end with their object."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from e2e_test_adapters import copy_of_routing
from e2e_world import ROOT, World

DASHBOARDS = sorted((ROOT / "charts" / "lorapool" / "dashboards").glob("*.json"))


def _scrape(world: World, component: str) -> str:
    """The /metrics text of one pod, read through the API server's proxy."""
    selector = "lorapool.dev/base" if component == "runtime" else f"app.kubernetes.io/component={component}"
    pod = world.get("pods", "-l", selector)["items"][0]["metadata"]["name"]
    return world.kubectl("get", "--raw", f"/api/v1/namespaces/{world.namespace}/pods/{pod}:9090/proxy/metrics")


@pytest.mark.parametrize("component", ["gateway", "operator", "runtime"])
def test_promtool_finds_nothing_to_complain_of(world: World, component: str) -> None:
    world.chat("routing")
    text = _scrape(world, component)
    own = "\n".join(line for line in text.splitlines() if "vllm:" not in line) + "\n"
    promtool = Path(world.summary["kubectl"]).parent / "promtool"
    done = subprocess.run([promtool, "check", "metrics"], input=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"lorapool_{component}_" in text


def _expressions(path: Path) -> list[str]:
    found: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("expr"), str):
                found.append(node["expr"])
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(json.loads(path.read_text()))
    return found


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_dashboard_expression_returns_a_series(world: World, path: Path) -> None:
    for task in world.tasks:
        world.chat(task)
    empty: list[str] = []

    def all_there() -> object:
        empty.clear()
        for expression in _expressions(path):
            if not world.prometheus(_filled(expression, world)):
                empty.append(expression)
        return not empty or f"{len(empty)} empty: {empty[:3]}"

    world.wait("series for each expression", all_there, timeout_s=120, every_s=5)


def _filled(expression: str, world: World) -> str:
    values = {"namespace": ".*", "base": ".*", "adapter": ".*", "pod": ".*", "instance": ".*", "job": ".*"}
    expression = re.sub(r"\$__rate_interval|\$__range|\$__interval", "5m", expression)
    return re.sub(r"\$\{?(\w+)(:\w+)?\}?", lambda match: values.get(match[1], ".*"), expression)


def test_the_series_of_a_deleted_adapter_vanish(world: World, tmp_path: Path) -> None:
    copy_of_routing(world, "shortlived")
    world.wait("Ready", lambda: world.condition("lora", "shortlived", "Ready")[0] == "True", timeout_s=30)
    with world.client() as client:
        client.chat.completions.create(**{**world.question("routing"), "model": world.model("shortlived")})
    for component in ("gateway", "runtime"):
        assert "shortlived" in _scrape(world, component)
    world.kubectl("delete", "lora", "shortlived")
    for component in ("gateway", "runtime", "operator"):
        world.wait(
            f"the end of the series of {component}",
            lambda component=component: "shortlived" not in _scrape(world, component),  # type: ignore[misc]
            timeout_s=60,
        )
