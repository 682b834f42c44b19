"""Runs the demo once under its own name and gives the cluster tests its summary.

LORAPOOL_E2E_SUMMARY=<path of a summary.json> uses a demo that is up already; LORAPOOL_E2E_KEEP=1 leaves it up.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import ROOT, World

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
