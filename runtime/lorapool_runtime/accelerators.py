"""Whether this process was given a GPU, found out without a framework, whose import takes seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

GPU_NODE = Path("/dev/nvidia0")
"""Exists in a container that was given a GPU, and on every machine with NVIDIA's driver."""
GPU_GIVEN = "NVIDIA_VISIBLE_DEVICES"
"""Set by Kubernetes' device plugin in the containers that were given a GPU."""
_NOT_GIVEN = ("", "void", "none")


def gpu_given(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Kubernetes gave this container a GPU."""
    return environ.get(GPU_GIVEN, "") not in _NOT_GIVEN


def expects_gpu(device: str, *, node: Path = GPU_NODE, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `auto`, `cpu` or `cuda` means a GPU here, if it can be used."""
    return device == "cuda" or (device == "auto" and (gpu_given(environ) or node.exists()))
