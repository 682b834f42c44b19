"""The example fleets: they render, the API server accepts their objects, and their page computes the memory right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from apiserver import ApiServer, leader_worker_sets, running_apiserver
from chart_kit import NAMESPACE, REPOSITORY, grants, of_kind, render, restricted_violations

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.common import FIELD_MANAGER
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.manifests import children
from lorapool_operator.decisions.profile_checks import profile_problem
from lorapool_operator.world.cluster_cache import BaseObject, Meta
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile, gpus, parse_profiles

FLEETS = sorted((REPOSITORY / "examples" / "fleets").glob("*.yaml"))
PAGE = (REPOSITORY / "docs" / "how-to" / "serve-on-several-gpus.md").read_text()
IMAGE = RuntimeImage("registry.example/lorapool-runtime-vllm:1", "IfNotPresent")

by_fleet = pytest.mark.parametrize("file", FLEETS, ids=lambda file: file.stem)


def fleet(file: Path) -> RuntimeProfile:
    """The one profile of an example, as the operator reads it from the rendered chart."""
    rendered = of_kind(render(yaml.safe_load(file.read_text())), "ConfigMap")["lorapool-runtime-profiles"]
    profiles = parse_profiles(rendered["data"]["profiles.yaml"], origin="chart")
    [name] = set(profiles) - {"default"}
    assert name == file.stem
    return profiles[name]


def objects(profile: RuntimeProfile, **spec: Any) -> list[dict[str, Any]]:
    meta = Meta(NAMESPACE, "llama", "11111111-2222-3333-4444-555555555555", 1, "1", 0.0, False, None)
    base = BaseObject(
        meta, BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}, **spec}), BaseModelStatus()
    )
    rules = SourceRules(owner=NAMESPACE)
    return children(base, profile, IMAGE, replicas=1, token_sha256=("ab",), rules=rules, tls=True)


@by_fleet
def test_an_example_fleet_is_consistent_and_has_the_gpus_of_its_name(file: Path) -> None:
    profile = fleet(file)
    assert profile_problem(profile, IMAGE, "llama") is None
    shapes = {"l40s": (1, 1), "h100": (1, 1), "h100-8": (1, 8), "h100-2x8": (2, 8)}
    assert (profile.nodes, gpus(profile.resources)) == shapes[file.stem]
    assert f"(../../examples/fleets/{file.name})" in PAGE


@by_fleet
def test_the_pods_of_an_example_fleet_are_restricted(file: Path) -> None:
    for made in objects(fleet(file)):
        groups = made["spec"].get("leaderWorkerTemplate") if made["kind"] == "LeaderWorkerSet" else None
        templates = [groups["leaderTemplate"], groups["workerTemplate"]] if groups else []
        templates += [made["spec"]["template"]] if made["kind"] == "Deployment" else []
        for template in templates:
            found = restricted_violations(template["spec"])
            assert found == (["volume models is a hostPath"] if file.stem == "h100-8" else []), made["kind"]


def test_claims_are_a_right_where_nodes_share_one() -> None:
    for file in FLEETS:
        [lines] = [
            lines for name, lines in grants(render(yaml.safe_load(file.read_text()))).items() if "operator" in name
        ]
        assert any("persistentvolumeclaims" in line for line in lines) == (file.stem == "h100-2x8")


# --- the memory that the page computes


class Shape(NamedTuple):
    """A model and where it is served."""

    parameters: float
    layers: int
    hidden: int
    inner: int
    rank: int
    slots: int
    tensor: int = 1
    pipeline: int = 1
    gpu: float = 85.0e9
    other: float = 3e9


SHAPES = {
    "one L40S": Shape(8.03e9, 32, 4096, 14336, 32, 16, gpu=48.3e9),
    "one H100": Shape(14.77e9, 48, 5120, 13824, 32, 32),
    "each of 8 H100": Shape(70.6e9, 80, 8192, 28672, 32, 32, tensor=8, other=4e9),
    "each of 2 × 8 H100": Shape(405.9e9, 126, 16384, 53248, 16, 8, tensor=8, pipeline=2, other=4e9),
}
KV_WIDTH = 8 * 128
"""Key-value heads and their size, the same in all four."""


def rows() -> dict[str, list[str]]:
    found = (line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith(("| one ", "| each ")))
    return {cells[0].partition(",")[0]: cells[1:] for cells in found}


@pytest.mark.parametrize("name", SHAPES)
def test_the_page_computes_the_memory_right(name: str) -> None:
    shape = SHAPES[name]
    count = shape.tensor * shape.pipeline
    weights = shape.parameters * 2 / count
    kv = 2 * shape.layers * KV_WIDTH * 2 / count
    hidden, inner = shape.hidden, shape.inner
    by_column = [(hidden, hidden), (hidden, KV_WIDTH), (hidden, KV_WIDTH), (hidden, inner), (hidden, inner)]
    by_row = [(hidden, hidden), (inner, hidden)]
    width = sum(a + b / shape.tensor for a, b in by_column) + sum(a / shape.tensor + b for a, b in by_row)
    slot = width * shape.layers / shape.pipeline * shape.rank * 2
    slots = slot * (shape.slots + 1)
    left = shape.gpu * 0.9 - weights - slots - shape.other
    tokens = left / kv
    assert rows()[name] == [
        f"{weights / 1e9:.1f} GB",
        f"{slot / 1e6:.0f} MB",
        f"{slots / 1e9:.1f} GB",
        f"{kv / 1e3:.0f} kB",
        f"{left / 1e9:.1f} GB",
        f"{tokens // 1000 * 1000:,.0f}",
        f"{tokens // 8192:.0f}",
    ]


def test_the_page_names_the_slots_that_the_examples_are_for() -> None:
    for file, shape in zip(("l40s", "h100", "h100-8", "h100-2x8"), SHAPES.values(), strict=True):
        text = (REPOSITORY / "examples" / "fleets" / f"{file}.yaml").read_text()
        assert f"{shape.slots} adapters of rank {shape.rank}" in text
        assert re.search(rf"{file}\.yaml.*{shape.slots} adapters of rank {shape.rank}", PAGE)


# --- the API server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("fleets")) as running:
        running.kubectl("create", "namespace", NAMESPACE)
        running.install_crds(leader_worker_sets())
        yield running


@pytest.mark.apiserver
def test_the_api_server_accepts_every_object_of_every_example_fleet(server: ApiServer) -> None:
    for file in FLEETS:
        made = objects(fleet(file), maxModelLen=8192, lora={"slots": 8})
        for item in made:
            del item["metadata"]["ownerReferences"]
        listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": made})
        options = ("--server-side", "--dry-run=server", "--validate=strict", f"--field-manager={FIELD_MANAGER}")
        said = server.kubectl("apply", *options, "-f", "-", stdin=listed)
        assert len(said.splitlines()) == len(made)
        assert ("leaderworkerset" in said) == (file.stem == "h100-2x8")


@pytest.mark.apiserver
def test_no_field_of_a_leader_worker_set_is_lost_at_the_api_server(server: ApiServer) -> None:
    [wanted] = [item for item in objects(fleet(FLEETS[0].with_stem("h100-2x8"))) if item["kind"] == "LeaderWorkerSet"]
    del wanted["metadata"]["ownerReferences"]
    command = (
        "apply",
        "--server-side",
        "--validate=strict",
        f"--field-manager={FIELD_MANAGER}",
        "-o",
        "json",
        "-f",
        "-",
    )
    stored = json.loads(server.kubectl(*command, stdin=json.dumps(wanted)))
    assert list(lost(wanted["spec"], stored["spec"])) == []


def lost(wanted: Any, stored: Any, path: str = "spec") -> Iterator[str]:
    """The paths at which the stored object has not what was wanted; quantities are compared by the server alone."""
    if isinstance(wanted, dict):
        for name, value in wanted.items():
            if name in ("resources", "sizeLimit"):
                continue
            yield from lost(value, stored.get(name) if isinstance(stored, dict) else None, f"{path}.{name}")
    elif isinstance(wanted, list):
        for index, value in enumerate(wanted):
            found = stored[index] if isinstance(stored, list) and index < len(stored) else None
            yield from lost(value, found, f"{path}[{index}]")
    elif wanted != stored:
        yield f"{path}: {wanted!r} became {stored!r}"
