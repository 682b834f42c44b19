"""Loads Triton's CUDA driver module without a C compiler.

Before its first launch Triton compiles one C file of its own, `driver.c`, for the Python that runs it. The runtime
image has no compiler and holds the compiled file instead (`hack/images/triton_driver.py` makes it with the image);
elsewhere Triton compiles it with the machine's. Kernels are compiled by Triton's own LLVM and the ptxas of its wheel,
and need no C compiler. This module loads the driver before the base is loaded, so that what is missing is reported at
once.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
import sysconfig
from pathlib import Path
from typing import Any

from lorapool_runtime.engines.errors import UnusableDeviceError

log = logging.getLogger(__name__)

FOLDER = Path(sys.prefix, "lib", "lorapool")
"""Where the image has the compiled module."""
_MODULE = "cuda_utils"  # Triton's name for it


def file_name(source: bytes) -> str:
    """The name of the compiled module. source: the content of driver.c, so that no other version's is ever loaded."""
    return f"{_MODULE}-{hashlib.sha256(source).hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"


def load_triton_driver(folder: Path = FOLDER) -> None:
    """Loads the driver module: the compiled one in `folder`, else one that Triton compiles now.

    Raises UnusableDeviceError, with the remedy, where Triton or a compiler is missing.
    """
    try:
        triton: Any = importlib.import_module("triton")
        nvidia: Any = importlib.import_module("triton.backends.nvidia.driver")
        active: Any = importlib.import_module("triton.runtime.driver").driver
    except ImportError as error:
        raise UnusableDeviceError(
            f"Triton, which compiles the GPU kernels, cannot be imported ({error}). An image built with CPU_ONLY=1 "
            "leaves it out: use the runtime image built with CPU_ONLY=0, or run on the CPU with --device cpu"
        ) from error
    compiled = folder / file_name((Path(nvidia.dirname) / "driver.c").read_bytes())
    if compiled.is_file():
        _use(triton, compiled)
    try:
        active.active.utils  # noqa: B018  # loads the module
    except Exception as error:  # Triton raises RuntimeError, AssertionError, OSError, CalledProcessError or ImportError
        raise UnusableDeviceError(
            f"Triton's CUDA driver module cannot be loaded ({type(error).__name__}: {error}). It is compiled C: use "
            "the "
            f"runtime image built with CPU_ONLY=0, which holds {compiled.name} in {folder}, or install a C compiler "
            "and Python's headers (gcc, libc6-dev, python3-dev), or run on the CPU with --device cpu"
        ) from error
    log.info("Triton's driver module", extra={"compiled_here": not compiled.is_file()})


def _use(triton: Any, compiled: Path) -> None:
    """Lets Triton take the compiled module where it would call a compiler."""

    def build(name: str, *_source_and_options: object) -> str:
        if name != _MODULE:
            raise RuntimeError(f"Triton wants to compile {name}, and only {_MODULE} is in this image")
        return str(compiled)

    triton.knobs.build.impl = build
    if not triton.knobs.nvidia.libcuda_path:  # only the compiler's linker needs it; else `ldconfig` is run to find it
        triton.knobs.nvidia.libcuda_path = str(compiled.parent)
