"""Removes from a Python environment what torch uses only with a GPU, for images that run without one (CPU_ONLY=1).

PyPI's torch for Linux is the CUDA build. The NVIDIA libraries that it opens by name on a GPU, the kernel compiler
(triton) and the headers are removed. Those that torch's own libraries are linked to must be there: the large ones are
replaced by stubs that export the same names. Together that is three quarters of the image. The Dockerfile imports torch
afterwards, which proves that nothing needed is missing.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from elf_stub import NotStubbableError, exports, stub  # type: ignore[import-not-found]  # inside the build the two files lie side by side

SITE = Path(sysconfig.get_path("purelib"))
STUB_ABOVE_BYTES = 20_000_000
"""The smaller ones stay: among them is CUDA's own runtime, to which torch registers its kernels when it is loaded."""
_LINE = re.compile(r"^\s*(\S+) => (.+?)(?: \(0x[0-9a-f]+\))?$", re.MULTILINE)


def needed(libraries: list[Path]) -> tuple[set[Path], set[str]]:
    """The files that the dynamic loader maps for these libraries, and the names that it does not find by itself."""
    files, names = {p.resolve() for p in libraries}, set()
    for library in libraries:
        done = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False)
        for name, path in _LINE.findall(done.stdout):
            if path.strip() == "not found":
                names.add(name)
            else:
                files.add(Path(path).resolve())
    return files, names


def _remove(path: Path) -> int:
    """Bytes freed."""
    size = 0 if path.is_symlink() else path.stat().st_size
    path.unlink()
    return size


def _replace(path: Path) -> int:
    """Replaces a large library by a stub where that can be made (x86-64), else keeps it; bytes freed."""
    size = path.stat().st_size
    if path.is_symlink() or size < STUB_ABOVE_BYTES:
        return 0
    try:
        content = stub(path.name, exports(path))
    except NotStubbableError as error:
        print(f"kept {path.name}: {error}")
        return 0
    path.unlink()  # not written in place: the cache of the package manager may share the file
    path.write_bytes(content)
    return size - len(content)


def main() -> None:
    torch = SITE / "torch"
    roots = [*torch.glob("_C*.so"), torch / "lib" / "libtorch_python.so", torch / "lib" / "libtorch_global_deps.so"]
    files, names = needed([p for p in roots if p.exists()])
    freed = 0
    for path in sorted((SITE / "nvidia").rglob("*")):
        if path.is_file() and path.suffix != ".py":
            is_needed = path.resolve() in files or path.name in names
            freed += _replace(path) if is_needed else _remove(path)
    for folder in (SITE / "triton", torch / "include", SITE / "nvidia" / "cu13" / "include"):
        if folder.is_dir():
            freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
            shutil.rmtree(folder)
    print(f"left out {freed / 1e9:.1f} GB that only a GPU uses")


if __name__ == "__main__":
    main()
