"""Opens the libraries that `runtime/native_build.py` compiled, or says why they cannot serve in this process.

The kernels' modules (`basekernel`) call it once, at load; plain torch serves where it refuses. The libraries must
share torch's OpenMP: a second runtime would bring its own threads, and the two would fight for the cores. Nothing is
compiled here, and LORAPOOL_NATIVE=0 leaves them aside.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "native"
_MAPS = Path("/proc/self/maps")


class NativeUnavailableError(RuntimeError):
    """Plain torch must serve; the message says why."""


def open_library(name: str, version: int, folder: Path = FOLDER, *, uses_openmp: bool = True) -> ctypes.CDLL:
    """`name` without lib and .so; its `<name>_version()` must return `version`."""
    path = folder / f"lib{name}.so"
    if os.environ.get("LORAPOOL_NATIVE") == "0":
        raise NativeUnavailableError("LORAPOOL_NATIVE=0")
    if not path.is_file():
        raise NativeUnavailableError(f"{path.name} was not built (make native)")
    if uses_openmp and not any("libgomp" in used for used in _openmp_runtimes()):
        raise NativeUnavailableError(
            "torch does not use libgomp here, and a second OpenMP would fight it for the cores"
        )
    try:
        library = ctypes.CDLL(str(path))
        if getattr(library, f"{name}_version")() != version:
            raise NativeUnavailableError(f"{path.name} is of another version: build it again (make native)")
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(str(error)) from error
    return library


def _openmp_runtimes() -> set[str]:
    """The OpenMP runtimes mapped into this process, by path."""
    try:
        paths = {line.split()[-1] for line in _MAPS.read_text().splitlines() if ".so" in line}
    except OSError:
        return set()
    return {path for path in paths if any(name in Path(path).name for name in ("libgomp", "libiomp", "libomp"))}
