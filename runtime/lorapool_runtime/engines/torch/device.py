"""Which device the engine runs on, and whether it can be used, decided before the base is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from lorapool_runtime.accelerators import GPU_NODE, expects_gpu, gpu_given
from lorapool_runtime.engines.errors import UnusableDeviceError

log = logging.getLogger(__name__)


def choose_device(wanted: str, *, node: Path = GPU_NODE, environ: Mapping[str, str] = os.environ) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises UnusableDeviceError for a GPU that was asked for, or that Kubernetes gave to this container, and that torch
    cannot use. `auto` runs on the CPU, with a warning, where a machine merely has such a GPU.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not expects_gpu(wanted, node=node, environ=environ):
        return torch.device("cpu")
    message = (
        f"torch cannot use a CUDA GPU here: {_reason()}. Give the pod a GPU (the profile's limit nvidia.com/gpu and "
        "its "
        "runtimeClassName), use the runtime image that was built with CPU_ONLY=0 and a driver that is new enough for "
        "its CUDA, or run on the CPU with --device cpu"
    )
    if wanted == "auto" and not gpu_given(environ):
        log.warning("%s; this process runs on the CPU", message)
        return torch.device("cpu")
    raise UnusableDeviceError(message)


def _reason() -> str:
    """What torch says when it is made to use the GPU."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch declares no types here
    except (RuntimeError, AssertionError, OSError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "it finds none"
