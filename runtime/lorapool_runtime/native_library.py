"""Opens the libraries that `runtime/native_build.py` compiled, or explains why they cannot be used in this process.

One environment variable decides about all of them, LORAPOOL_NATIVE:

    auto      (the default) the best instruction set that the processor has
    0         none: torch and NumPy compute everything
    baseline  no more than every processor of the architecture has; a library without such a variant is not used
    avx2      AVX2 and FMA, also where the processor has more
    avx512    AVX-512 F, BW and VL

Tests use it to run the same numbers under each instruction set. Nothing is compiled here.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "native"
SETTING = "LORAPOOL_NATIVE"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
_MAPS = Path("/proc/self/maps")


class NativeUnavailableError(RuntimeError):
    """The library cannot be used and torch or NumPy computes instead; the message gives the reason."""


class NativeSettingError(ValueError):
    """LORAPOOL_NATIVE has a value that does not exist, or that this processor cannot fulfil."""


def native_setting() -> str:
    """The value of LORAPOOL_NATIVE. Raises NativeSettingError for one that does not exist."""
    value = os.environ.get(SETTING, "auto")
    if value not in ("auto", "0", *INSTRUCTION_SETS):
        raise NativeSettingError(f"{SETTING} is {value!r}, not one of auto, 0, {', '.join(INSTRUCTION_SETS)}")
    return value


def open_library(name: str, version: int, folder: Path = FOLDER, *, shares_openmp: bool = True) -> ctypes.CDLL:
    """`name` without lib and .so; its `<name>_version()` must return `version`.

    shares_openmp: the library has threads of torch's OpenMP and a variant per instruction set; a second OpenMP runtime
    would bring its own threads, which would compete for the cores. Raises NativeUnavailableError and
    NativeSettingError."""
    setting, path = native_setting(), folder / f"lib{name}.so"
    if setting == "0":
        raise NativeUnavailableError(f"{SETTING}=0")
    if not path.is_file():
        raise NativeUnavailableError(f"{path.name} was not built (make native)")
    if shares_openmp and not any("libgomp" in used for used in _openmp_runtimes()):
        raise NativeUnavailableError(
            "torch does not use libgomp here, and the threads of a second OpenMP would compete for the cores"
        )
    try:
        library = ctypes.CDLL(str(path))
        if getattr(library, f"{name}_version")() != version:
            raise NativeUnavailableError(f"{path.name} is of another version: build it again (make native)")
        if shares_openmp:
            _select(library, name, setting)
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(str(error)) from error
    return library


def _select(library: ctypes.CDLL, name: str, setting: str) -> None:
    """Before anything is packed for one of the variants."""
    select = getattr(library, f"{name}_select")
    select.argtypes, select.restype = [ctypes.c_char_p], ctypes.c_int
    if not select(setting.encode()):
        raise NativeSettingError(f"{SETTING}={setting}, but this processor does not have these instructions")


def _openmp_runtimes() -> set[str]:
    """The OpenMP runtimes mapped into this process, by path."""
    try:
        paths = {line.split()[-1] for line in _MAPS.read_text().splitlines() if ".so" in line}
    except OSError:
        return set()
    return {path for path in paths if any(name in Path(path).name for name in ("libgomp", "libiomp", "libomp"))}
