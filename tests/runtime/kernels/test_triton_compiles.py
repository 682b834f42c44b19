"""Every Triton kernel compiles for A100, H100 and B200, and uses the registers and memory that are written down.

With the compiler and assembler of Triton's wheel: no GPU is needed for that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton_kit
from triton_kit import CAPABILITIES, KERNELS, LLAMA_8B, MOST, SHARED_BYTES, TABLE

MOST_REGISTERS = 255
"""More than a thread can have; a kernel at the bound spills."""
PRODUCTS = ("_shrink_segments", "_expand_segments", "_attend")

Facts = dict[tuple[str, str, str], dict[str, int]]


def parsed(text: str) -> Facts:
    """By base, kernel and capability."""
    lines = [line.split(" ") for line in text.splitlines() if not line.startswith("#")]
    return {
        (base, kernel, capability): {key: int(value) for key, value in (fact.split("=") for fact in facts)}
        for base, kernel, capability, *facts in lines
    }


def compiled(tmp_path: Path, *options: str) -> Facts:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    cache = Path(os.environ.get("LORAPOOL_CACHE", tmp_path)) / "triton"  # by source: what changed is compiled
    variables |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, triton_kit.__file__, *options]
    done = subprocess.run(program, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


def names(bases: tuple[str, ...], capabilities: tuple[int, ...]) -> Iterator[tuple[str, str, str]]:
    kernels = [name for of_module in KERNELS.values() for name in of_module]
    for base in bases:
        yield from ((base.replace(" ", "-"), name, f"sm_{one}") for name in kernels for one in capabilities)


def test_what_is_written_down_covers_every_kernel_spills_nothing_and_fits() -> None:
    table = parsed(TABLE.read_text())
    assert table.keys() == set(names(MOST, CAPABILITIES))
    for (base, kernel, capability), facts in table.items():
        name = f"{base} {kernel} {capability}"
        assert facts["spilled_bytes"] == 0, name
        assert facts["registers"] < MOST_REGISTERS, name
        assert facts["shared_bytes"] <= SHARED_BYTES[int(capability.removeprefix("sm_"))], name
        if (base, kernel) != ("Falcon-7B", "_write"):  # a row of one head, two bytes for each thread
            assert facts["vector_loads"] > 0, name
        assert (facts["tensor_core_products"] > 0) == (kernel in PRODUCTS), name


def test_the_kernels_of_an_h100_compile_to_what_is_written_down(tmp_path: Path) -> None:
    table = parsed(TABLE.read_text())
    found = compiled(tmp_path, "--some")
    assert found.keys() == set(names((LLAMA_8B,), (90,)))
    assert found == {key: table[key] for key in found}, "python tests/support/triton_kit.py --write"


@pytest.mark.deep
def test_all_kernels_compile_to_what_is_written_down(tmp_path: Path) -> None:
    assert compiled(tmp_path) == parsed(TABLE.read_text()), "python tests/support/triton_kit.py --write"
