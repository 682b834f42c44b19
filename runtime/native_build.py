"""Compiles the runtime's native kernels: `make native`, and a hook of the wheel's build. Never at run time.

    python runtime/native_build.py

Each source is compiled once per instruction set, so that the wheel runs on any CPU of its architecture and uses the
best instructions it has. Without a compiler the wheel is pure Python and the runtime uses plain torch products, except
with LORAPOOL_NATIVE=require (the images), where that is an error; LORAPOOL_NATIVE=0 builds no library, and a wheel made
with LORAPOOL_NATIVE=compiled takes the libraries that `make native` left, or fails where it left none.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "native"
BUILT = ROOT / "lorapool_runtime" / "native"
LIBRARIES = {"lora_rows": True, "base_step": False}
"""Each is built from NAME.cpp and NAME_variant.cpp; True: it has a variant for processors without any of VARIANTS."""
MORE = {"base_step": ("base_step_program",)}
"""Further sources of a library, compiled for any processor of the architecture."""
SINGLE = ("lora_pack",)
"""Each is built from NAME.cpp alone, for any processor of the architecture, without OpenMP."""
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra")
VARIANTS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    },
}
"""Instruction sets by machine; NAME.cpp chooses among them at run time."""

BUILD_SETTINGS = ("auto", "0", "require", "compiled", "baseline", "avx2", "avx512")
"""Of LORAPOOL_NATIVE. The instruction sets choose among the variants at run time (`lorapool_runtime.native_library`);
all variants are built."""


class CompilerMissingError(RuntimeError):
    """There is no C++ compiler on this machine."""


def compile_library(to: Path) -> Path:
    """`to` is named libNAME.so. Raises CompilerMissingError; subprocess.CalledProcessError when the compiler refuses
    the source."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CompilerMissingError("no C++ compiler (g++) is installed")
    library = to.stem.removeprefix("lib")
    variants: dict[str, tuple[str, ...]] = {}
    threads = ("-pthread",) if library in SINGLE else ("-fopenmp",)
    if library in LIBRARIES:
        variants = {**({"baseline": ()} if LIBRARIES[library] else {}), **VARIANTS.get(platform.machine(), {})}
    with tempfile.TemporaryDirectory() as scratch:
        # relative paths and a fixed order: the same sources give the same bytes
        jobs = [("entry", f"{library}.cpp", ()), *((more, f"{more}.cpp", ()) for more in MORE.get(library, ()))]
        jobs += [(name, f"{library}_variant.cpp", (f"-DVARIANT={name}", *flags)) for name, flags in variants.items()]
        running = [
            subprocess.Popen(
                [compiler, *FLAGS, *threads, *flags, "-c", source, "-o", f"{scratch}/{name}.o"], cwd=SOURCES
            )
            for name, source, flags in jobs
        ]
        failed = [one.args for one in running if one.wait()]
        if failed:
            raise subprocess.CalledProcessError(1, failed[0])
        objects = [f"{name}.o" for name, _, _ in jobs]
        made = Path(scratch, to.name)
        subprocess.run([compiler, "-shared", *threads, *objects, "-o", made.name], cwd=scratch, check=True)
        to.parent.mkdir(exist_ok=True)
        partial = to.with_suffix(".partial")
        shutil.copyfile(made, partial)
        partial.replace(to)  # a running process keeps the one it has mapped
    return to


def compile_all() -> list[Path]:
    """Compiles every library into the package. Raises as `compile_library`."""
    return [compile_library(BUILT / f"lib{name}.so") for name in (*LIBRARIES, *SINGLE)]


def main() -> int:
    try:
        for path in compile_all():
            print(f"built {path.relative_to(ROOT.parent)}")
    except CompilerMissingError as error:
        print(f"{error}: the runtime will use plain torch products, which are slower", file=sys.stderr)
    return 0


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, where hatchling need not be installed
    pass
else:

    class NativeKernelHook(BuildHookInterface[Any]):
        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            wish = os.environ.get("LORAPOOL_NATIVE", "auto")
            if wish not in BUILD_SETTINGS:
                raise ValueError(f"LORAPOOL_NATIVE is {wish!r}, not one of {', '.join(BUILD_SETTINGS)}")
            libraries = [BUILT / f"lib{name}.so" for name in (*LIBRARIES, *SINGLE)]
            if wish == "compiled":
                if missing := [library.name for library in libraries if not library.exists()]:
                    raise ValueError(
                        f"LORAPOOL_NATIVE=compiled, but {', '.join(missing)} is missing: run `make native`"
                    )
            else:
                for library in libraries:
                    library.unlink(missing_ok=True)
                if wish == "0":
                    return
                try:
                    compile_all()
                except CompilerMissingError as error:
                    if wish == "require":
                        raise
                    self.app.display_warning(f"{error}: the wheel has no native kernels")
                    return
            build_data["pure_python"] = False
            if version != "editable":
                build_data["tag"] = f"py3-none-linux_{platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
