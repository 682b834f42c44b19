"""Puts hack/models on the path, as running its scripts does, and provides a registry on loopback."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "hack" / "models"))

from small_registry import SmallRegistry  # noqa: E402


@pytest.fixture
def registry() -> Iterator[SmallRegistry]:
    with SmallRegistry() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
