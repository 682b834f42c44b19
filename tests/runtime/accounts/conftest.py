from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accounts_kit import Accounts
from fakes_runtime import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "usage"


@pytest.fixture
def accounts(folder: Path, clock: FakeClock) -> Iterator[Accounts]:
    """A process that keeps its records in `folder`."""
    made = Accounts(folder, clock)
    yield made
    made.kill()
