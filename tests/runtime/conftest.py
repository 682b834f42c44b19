"""Shared fixtures of the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes_runtime import save_byte_tokenizer
from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)  # the time of an example depends on the machine
settings.load_profile("shared-machine")


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder in which every byte is one token."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
