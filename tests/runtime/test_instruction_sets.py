"""The numeric tests pass under every instruction set that the machine can be held to, and on any number of threads.

`make test-deep` repeats all of them; every other run of the tests repeats one file under two combinations.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from instruction_sets import ALL, FEW, Combination, processor_flags

ROOT = Path(__file__).resolve().parents[2]
FAST = ("tests/runtime/engine/test_numeric_smoke.py",)
NUMERIC = (
    *FAST,
    "tests/runtime/engine/test_engine_bfloat16.py",
    "tests/runtime/engine/test_engine_equality.py",
    "tests/runtime/engine/test_engine_matrix.py",
    "tests/runtime/engine/test_engine_prompt_logprobs.py",
    "tests/runtime/engine/test_real_finetunes.py",
    "tests/runtime/engine/test_sampling.py",
    "tests/runtime/kernels/test_base_step_kernel.py",
    "tests/runtime/kernels/test_lora_kernel_cpu.py",
    "tests/runtime/kernels/test_lora_layer.py",
    "tests/runtime/kernels/test_step_program.py",
    "tests/runtime/serving/test_lm_eval.py",
    "tests/runtime/weights/test_weights_pack.py",
)
RUN_PYTEST = (
    "import sys, pytest, torch; print(torch.backends.cpu.get_cpu_capability().lower()); "
    "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
)


def run_tests(combination: Combination, files: Sequence[str], *, timeout_s: float) -> None:
    """Runs the files in a process held to the combination. Skips where the processor cannot be held to it."""
    if missing := combination.missing(processor_flags()):
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    done = subprocess.run(
        [sys.executable, "-c", RUN_PYTEST, *files], cwd=ROOT, env=combination.environ(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{combination}\n{done.stdout[-6000:]}"
    assert done.stdout.splitlines()[0] == combination.aten
    print(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("combination", FEW, ids=str)
def test_a_small_engine_equals_peft_under_two_combinations(combination: Combination) -> None:
    run_tests(combination, FAST, timeout_s=600)


@pytest.mark.deep
@pytest.mark.parametrize("combination", ALL, ids=str)
def test_all_numeric_tests_pass_under_every_combination(combination: Combination) -> None:
    run_tests(combination, NUMERIC, timeout_s=3600)


def test_a_combination_names_the_instructions_that_the_processor_lacks(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 fma avx512f\nprocessor : 1\nflags\t: sse\n")
    flags = processor_flags(tmp_path / "cpuinfo")
    assert Combination("avx2", "AVX2", "0", 1).missing(flags) == frozenset()
    assert Combination("avx2", "DEFAULT", "avx512", 1).missing(flags) == {"avx512bw", "avx512vl", "avx512dq"}
    (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd\n")
    assert processor_flags(tmp_path / "cpuinfo") == frozenset()


def test_every_choice_that_compiles_to_other_instructions_is_covered() -> None:
    assert {one.aten for one in ALL} == {"default", "avx2", "avx512"}
    assert {one.onednn for one in ALL} == {"DEFAULT", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16"}
    assert {one.native for one in ALL} == {"0", "baseline", "avx2", "avx512", "auto"}
    assert {one.threads for one in ALL} == {1, 2, 4}


def test_every_numeric_file_exists() -> None:
    assert [file for file in NUMERIC if not (ROOT / file).is_file()] == []
