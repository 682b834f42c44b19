"""Shared fixtures of the runtime's tests, and the number of threads for repeated numeric tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fakes_runtime import save_byte_tokenizer
from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)  # the time of an example depends on the machine
settings.load_profile("shared-machine")

if threads := os.environ.get("LORAPOOL_TEST_THREADS"):
    import torch

    torch.set_num_threads(int(threads))  # OMP_NUM_THREADS alone gives no more threads than there are cores


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder in which every byte is one token."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
