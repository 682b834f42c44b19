"""The stubs that stand for NVIDIA's libraries in CPU images, given to the dynamic loader itself."""

import ctypes
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HACK = Path(__file__).resolve().parents[2] / "hack"
sys.path.insert(0, str(HACK / "images"))

from elf_stub import Export, NotStubbableError, exports, stub  # noqa: E402

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="stubs are made for x86-64")


def _nvidia(name: str) -> Path:
    """A library of the installed CUDA packages, which torch brings."""
    for file in importlib.metadata.files("nvidia-cublas") or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise AssertionError(f"{name} is not installed")


def _exported_with_version(library: Path, wanted: list[Export]) -> list[str]:
    """The names that the loader does not find in the library under their version."""
    loaded = ctypes.CDLL(str(library))
    dlvsym = ctypes.CDLL(None).dlvsym
    dlvsym.restype, dlvsym.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    return [
        e.name
        for e in wanted
        if e.version != e.name  # the symbol that stands for the version itself
        and not dlvsym(loaded._handle, e.name.encode(), e.version.encode())
    ]


def test_the_loader_finds_every_name_and_version_of_the_library_in_its_stub(tmp_path: Path) -> None:
    original = exports(_nvidia("libcublasLt.so.13"))
    made = tmp_path / "libcublasLt.so.13"
    made.write_bytes(stub(made.name, original))
    assert len(original) > 100
    assert {e.version for e in original} == {"libcublasLt.so.13"}
    assert _exported_with_version(made, original) == []
    assert made.stat().st_size < 100_000


def test_a_function_of_a_stub_returns_an_error_and_a_variable_is_zero(tmp_path: Path) -> None:
    made = tmp_path / "libone.so"
    made.write_bytes(stub(made.name, [Export("function", 0x12, ""), Export("variable", 0x11, "")]))
    library = ctypes.CDLL(str(made))
    assert library.function(1, 2, 3) == 999
    assert ctypes.c_long.in_dll(library, "variable").value == 0


def test_a_library_that_needs_the_stubbed_one_is_loaded_with_all_its_names_resolved(tmp_path: Path) -> None:
    made = tmp_path / "libcublasLt.so.13"
    made.write_bytes(stub(made.name, exports(_nvidia("libcublasLt.so.13"))))
    program = (
        "import ctypes, os, sys\n"
        "ctypes.CDLL(sys.argv[1], os.RTLD_NOW | os.RTLD_GLOBAL)\n"
        "ctypes.CDLL(sys.argv[2], os.RTLD_NOW)\n"
        "mapped = {line.split()[-1] for line in open('/proc/self/maps') if 'libcublasLt' in line}\n"
        "assert mapped == {sys.argv[1]}, mapped\n"
    )
    command = [sys.executable, "-c", program, str(made), str(_nvidia("libcublas.so.13"))]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a library, but long enough to hold a header of sixty-four bytes in all")
    with pytest.raises(NotStubbableError, match="not a library for x86-64"):
        exports(tmp_path / "text")
