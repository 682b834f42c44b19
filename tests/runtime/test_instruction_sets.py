"""The numeric tests pass under every instruction set that the machine can be held to, and on any number of threads.

`make test-deep` repeats all of them; every other run of the tests repeats one file under one combination.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
NEEDS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma"}),
    "avx512": AVX512,
    "AVX2": frozenset({"avx2", "fma"}),
    "AVX512_CORE": AVX512,
    "AVX512_CORE_BF16": AVX512 | {"avx512_bf16"},
}
"""The flags in /proc/cpuinfo that a choice needs; a choice that is not listed runs everywhere."""


@dataclass(frozen=True)
class Combination:
    aten: str
    """ATEN_CPU_CAPABILITY: default (no vector instructions beyond the compiler's), avx2 or avx512."""
    onednn: str
    """ONEDNN_MAX_CPU_ISA: DEFAULT (all that the processor has), AVX2, AVX512_CORE or AVX512_CORE_BF16."""
    native: str
    """LORAPOOL_NATIVE: 0 (no native kernels), baseline, avx2, avx512 or auto."""
    threads: int

    def __str__(self) -> str:
        return f"aten={self.aten},onednn={self.onednn},native={self.native},threads={self.threads}"

    def missing(self, flags: frozenset[str]) -> frozenset[str]:
        """The processor flags that this combination needs and the processor lacks."""
        needed = (NEEDS.get(choice, frozenset()) for choice in (self.aten, self.onednn, self.native))
        return frozenset().union(*needed) - flags

    def environ(self) -> dict[str, str]:
        return os.environ | {
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "LORAPOOL_NATIVE": self.native,
            "OMP_NUM_THREADS": str(self.threads),
            "LORAPOOL_TEST_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",  # there may be more threads than cores
        }


FURTHEST = Combination("default", "AVX2", "baseline", 4)
"""For every run of the tests: the furthest from what the machine chooses by itself, which all other tests use."""

ALL = (
    Combination("default", "AVX2", "0", 1),
    Combination("default", "DEFAULT", "auto", 2),
    Combination("avx2", "AVX2", "baseline", 4),
    Combination("avx2", "DEFAULT", "avx2", 2),
    Combination("default", "AVX2", "avx2", 4),
    Combination("avx512", "AVX512_CORE", "avx512", 1),
    Combination("avx512", "AVX512_CORE_BF16", "avx2", 4),
    Combination("avx512", "DEFAULT", "avx512", 2),
    Combination("avx512", "AVX512_CORE", "0", 2),
    Combination("avx2", "AVX512_CORE_BF16", "avx512", 4),
    Combination("avx512", "AVX512_CORE_BF16", "baseline", 1),
)
"""About five minutes each on two cores. Every choice occurs with one thread or two, and with four."""


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The feature flags of the first processor, empty where the file lists none (Arm)."""
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    return next((frozenset(value.split()) for name, _, value in lines if name.strip() == "flags"), frozenset())


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


def test_a_small_engine_equals_peft_under_other_instructions() -> None:
    run_tests(FURTHEST, FAST, timeout_s=600)


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
