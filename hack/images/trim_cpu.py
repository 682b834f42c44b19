"""Removes from a Python environment what torch uses only with a GPU, for images that run without one (CPU_ONLY=1).

PyPI's torch for Linux is the CUDA build. The NVIDIA libraries that torch's own libraries are linked to must stay; those
it opens by name on a GPU, the kernel compiler (triton) and the headers are half of the image and are removed. The
Dockerfile imports torch afterwards, which proves that nothing needed is missing.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
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


def main() -> None:
    torch = SITE / "torch"
    roots = [*torch.glob("_C*.so"), torch / "lib" / "libtorch_python.so", torch / "lib" / "libtorch_global_deps.so"]
    files, names = needed([p for p in roots if p.exists()])
    freed = 0
    for path in sorted((SITE / "nvidia").rglob("*")):
        if path.is_file() and path.resolve() not in files and path.name not in names and path.suffix != ".py":
            freed += 0 if path.is_symlink() else path.stat().st_size
            path.unlink()
    for folder in (SITE / "triton", torch / "include", SITE / "nvidia" / "cu13" / "include"):
        if folder.is_dir():
            freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
            shutil.rmtree(folder)
    print(f"left out {freed / 1e9:.1f} GB that only a GPU uses")


if __name__ == "__main__":
    main()
