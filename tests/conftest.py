"""What must be set before any test module is imported, and which files run first."""

import os
from pathlib import Path

import pytest

# Triton reads it once, when something first imports it, and on a CPU its kernels run by its interpreter alone.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONGEST = {
    "test_lm_eval.py",
    "test_real_finetunes.py",
    "test_serve_finetunes.py",
    "test_instruction_sets.py",
    "test_engine_matrix.py",
    "test_serve_local.py",
    "test_laptop.py",
    "test_session.py",
    "test_engine_isolation.py",
    "test_engine_peft.py",
    "test_trainer_server.py",
    "test_ledger_witness.py",
    "test_ledger_process.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first: begun last, one of them would keep a single worker busy after the others ended."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
