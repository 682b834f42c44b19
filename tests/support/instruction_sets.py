"""The instruction sets and thread counts that numeric tests are repeated under, and how a child process is held to one.

Numbers must not depend on the machine: torch, oneDNN and our own kernels each choose code by what the processor has.
A combination sets all three choices and the number of threads through the environment, so it needs a process of its
own. `engine_kit`, `runtime_process` and `tests/runtime/conftest.py` read LORAPOOL_TEST_THREADS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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


FEW = (Combination("default", "AVX2", "0", 4), Combination("avx2", "DEFAULT", "baseline", 2))
"""For every run of the tests; what the machine chooses by itself, on one thread, is tested by all other tests."""

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
