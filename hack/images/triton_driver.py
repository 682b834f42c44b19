"""Compiles Triton's CUDA driver module for an image that has no C compiler when it runs.

    python triton_driver.py FOLDER      needs gcc, the headers of libc and of Python; no GPU, no driver of NVIDIA

The module is linked to libcuda.so.1, which only machines with a GPU have. A library that exports the same names stands
in for it while linking and for a check that the module can be loaded. `lorapool_runtime` finds the file by its name.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MODULE = "cuda_utils"
NEEDED = ("load_binary", "launch", "get_device_properties", "build_signature_metadata")
"""Functions of the module without which nothing can be launched."""
LIBRARY = "libcuda.so.1"
_CHECK = """
import ctypes, importlib.util, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location(sys.argv[3], sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
missing = [name for name in sys.argv[4:] if not hasattr(module, name)]
sys.exit(f"the module lacks {missing}" if missing else 0)
"""


def backend() -> Path:
    """The folder of Triton's CUDA backend. Triton is not imported: that would need torch's libraries."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        sys.exit("Triton is not installed in this environment")
    return Path(found.origin).parent / "backends" / "nvidia"


def file_name(source: bytes) -> str:
    """As `lorapool_runtime.engines.torch.kernels.triton_driver.file_name`."""
    return f"{MODULE}-{hashlib.sha256(source).hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"


def stand_in(source: str, folder: Path, compiler: str, definitions: str = "") -> Path:
    """A libcuda.so.1 in which every function that `source` calls does nothing and returns 0 (success)."""
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", source)))
    own = [name for name in names if not re.search(rf"\b{name}\(", definitions)]
    text = definitions + "".join(f"int {name}() {{ return 0; }}\n" for name in own)
    (folder / "libcuda.c").write_text(text)
    made = folder / LIBRARY
    options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{LIBRARY}", "-o", str(made)]
    subprocess.run([compiler, *options, str(folder / "libcuda.c")], check=True)
    return made


def compile_driver(to: Path, compiler: str = os.environ.get("CC", "gcc")) -> Path:
    """Writes the module into the folder `to` and loads it once. Raises subprocess.CalledProcessError."""
    source = backend() / "driver.c"
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        library = stand_in(source.read_text(), Path(scratch), compiler)
        made = Path(scratch, "made.so")
        include = [f"-I{backend() / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
        command = [compiler, "-O3", "-shared", "-fPIC", "-Wno-psabi", *include, str(source), "-o", str(made)]
        subprocess.run([*command, f"-L{scratch}", f"-l:{LIBRARY}"], check=True)
        subprocess.run([sys.executable, "-c", _CHECK, str(library), str(made), MODULE, *NEEDED], check=True)
        target = to / file_name(source.read_bytes())
        target.write_bytes(made.read_bytes())
    return target


if __name__ == "__main__":
    print(f"compiled {compile_driver(Path(sys.argv[1]))}")
