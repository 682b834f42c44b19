"""Runs the demo once under its own name and gives the cluster tests its summary.

LORAPOOL_E2E_SUMMARY=<path of a summary.json> uses a demo that is up already; LORAPOOL_E2E_KEEP=1 leaves it up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from e2e_world import ROOT, World

if TYPE_CHECKING:
    from e2e_tuning import Tuning

NAME = "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    if given := os.environ.get("LORAPOOL_E2E_SUMMARY"):
        yield World(json.loads(Path(given).read_text()), NAME)
        return
    demo = [sys.executable, str(ROOT / "hack" / "demo")]
    subprocess.run([*demo, "up", "--name", NAME, "--train"], check=True, timeout=3000)
    yield World(json.loads((ROOT / ".demo" / NAME / "summary.json").read_text()), NAME)
    if not os.environ.get("LORAPOOL_E2E_KEEP"):
        subprocess.run([*demo, "down", "--name", NAME, "--purge"], check=True, timeout=300)


@pytest.fixture(scope="module")
def tuning(world: World) -> Iterator[Tuning]:
    from e2e_tuning import Tuning  # imports transformers, which other files do not need

    with world.client(organization=world.namespace) as client:
        yield Tuning(world, client)
