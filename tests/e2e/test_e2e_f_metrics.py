"""Metrics of all three processes, the dashboards against the real Prometheus, and series that end with their object."""

import subprocess
from pathlib import Path

import pytest
from chart_kit import dashboard_expressions
from e2e_world import BASE, World, copies_of_routing


@pytest.mark.parametrize("component", ["gateway", "operator", "runtime"])
def test_promtool_finds_nothing_to_complain_of(world: World, component: str) -> None:
    world.chat("routing")
    promtool = Path(world.summary["kubectl"]).parent / "promtool"
    texts = world.scrape(component)
    assert texts
    for text in texts:
        own = "\n".join(line for line in text.splitlines() if "vllm:" not in line) + "\n"
        done = subprocess.run([promtool, "check", "metrics"], input=own, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"lorapool_{component}_" in text


def test_every_dashboard_expression_returns_a_series(world: World) -> None:
    for task in world.tasks:
        world.chat(task)
    every = dashboard_expressions(base=world.model(BASE), adapter=world.model("routing"))
    absent = ("tuning:", "bill: Waiting events", "bill: Events sent")  # no job trains, and there is no sink
    asked = [(where, expression) for where, expression in every if not where.startswith(absent)]
    assert len(asked) > 40

    def all_there() -> object:
        empty = [f"{where}: {expression}" for where, expression in asked if not world.prometheus(expression)]
        return not empty or f"{len(empty)} empty: {empty[:4]}"

    world.wait("a series for each expression", all_there, timeout_s=120, every_s=5)


def test_the_expiry_of_the_authority_is_exported_by_each_operator(world: World) -> None:
    found = world.prometheus("lorapool_operator_authority_expiry_timestamp_seconds - time()")
    assert found
    assert all(float(sample["value"][1]) > 9 * 365 * 86400 for sample in found)


def test_the_series_of_a_deleted_adapter_vanish(world: World, tmp_path: Path) -> None:
    world.apply(*copies_of_routing(world, ["shortlived"]))
    world.wait("Ready", lambda: world.condition("lora", "shortlived", "Ready")[0] == "True", timeout_s=30)
    with world.client() as client:
        client.chat.completions.create(**{**world.question("routing"), "model": world.model("shortlived")})
    for component in ("gateway", "runtime"):
        # Only the pod that served the request has the series.
        assert any("shortlived" in text for text in world.scrape(component))
    world.kubectl("delete", "lora", "shortlived")
    for component in ("gateway", "runtime", "operator"):
        world.wait(
            f"the end of the series of {component}",
            lambda component=component: not any("shortlived" in t for t in world.scrape(component)),  # type: ignore[misc]
            timeout_s=60,
        )
