"""Fixtures of the runtime's tests that are dear to make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fakes_runtime import save_byte_tokenizer
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when a kernel's module is imported

settings.register_profile("shared-machine", deadline=None)  # how long an example takes says more about the machine
settings.load_profile("shared-machine")


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder in which every byte is one token."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
