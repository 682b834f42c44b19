"""A GPU is used without a C compiler, or refused with a remedy before the base is loaded. No GPU is needed here."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapool_runtime.accelerators import GPU_GIVEN
from lorapool_runtime.engines.errors import UnusableDeviceError
from lorapool_runtime.engines.torch import core
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.device import choose_device
from lorapool_runtime.engines.torch.engine import TorchEngine
from lorapool_runtime.engines.torch.kernels import triton_driver

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "hack" / "images"))

import triton_driver as build  # type: ignore[import-not-found]  # noqa: E402  # a script of the image's build

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the stand-in for NVIDIA's driver")

LOADS = """
import sys
from pathlib import Path
import torch
torch.cuda.is_available = lambda: True  # what Triton asks before it loads its driver
from lorapool_runtime.engines.errors import UnusableDeviceError
from lorapool_runtime.engines.torch.kernels.triton_driver import load_triton_driver
for folder in sys.argv[1:]:
    try:
        load_triton_driver(Path(folder))
        import triton
        print("loaded", triton.runtime.driver.active.utils.launch.__name__)
    except UnusableDeviceError as error:
        print("refused", " ".join(str(error).split()))
"""


@needs_compiler
def test_without_a_compiler_the_image_s_module_is_loaded_and_a_missing_one_is_refused_with_a_remedy(
    tmp_path: Path,
) -> None:
    image, machine, nothing = tmp_path / "image", tmp_path / "machine", tmp_path / "nothing"
    machine.mkdir()
    nothing.mkdir()
    compiled = build.compile_driver(image)
    build.stand_in((build.backend() / "driver.c").read_text(), machine, "gcc")
    other = tmp_path / "other"
    other.mkdir()
    (other / triton_driver.file_name(b"the driver.c of another Triton")).write_bytes(compiled.read_bytes())
    variables = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX", "TRITON_INTERPRET")}
    variables |= {
        "PATH": str(nothing),
        "TRITON_LIBCUDA_PATH": str(machine),
        "LD_LIBRARY_PATH": str(machine),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", LOADS, str(nothing), str(other), str(image)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    first, second, third = done.stdout.splitlines() or [done.stderr, "", ""]
    for line in (first, second):
        assert line.startswith("refused Triton's CUDA driver module cannot be loaded (RuntimeError: Failed to find C ")
        assert "install a C compiler and Python's headers (gcc, libc6-dev, python3-dev)" in line
        assert f"holds {compiled.name} in " in line
    assert third == "loaded launch"


@needs_compiler
def test_the_image_holds_what_the_runtime_looks_for() -> None:
    source = (build.backend() / "driver.c").read_bytes()
    assert build.file_name(source) == triton_driver.file_name(source)
    assert Path(sys.prefix, "lib", "lorapool") == triton_driver.FOLDER
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "python3 -m venv /opt/lorapool\n" in dockerfile.replace(" \\", "")
    assert "python /opt/lorapool/triton_driver.py /opt/lorapool/lib/lorapool" in dockerfile


def test_without_triton_the_message_names_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnusableDeviceError, match="use the runtime image built with CPU_ONLY=0, or run on the CPU"):
        triton_driver.load_triton_driver()


def test_what_is_missing_for_a_gpu_is_reported_before_the_base_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UnusableDeviceError("no module")

    def load(*_: object, **__: object) -> Any:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr(core, "choose_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(core, "load_triton_driver", refuse)
    monkeypatch.setattr(core, "load_base", load)
    with pytest.raises(UnusableDeviceError, match="no module"):
        TorchEngine(EngineConfig(model_dir="anywhere")).start()


GIVEN, NOT_GIVEN = {GPU_GIVEN: "GPU-8c1f"}, {GPU_GIVEN: "void"}


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update.")

    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.usefixtures("no_cuda")
def test_a_gpu_that_cannot_be_used_is_refused_where_one_was_asked_for_or_given(tmp_path: Path) -> None:
    absent = tmp_path / "nvidia0"
    for wanted, environ in (("cuda", {}), ("cuda", NOT_GIVEN), ("auto", GIVEN)):
        with pytest.raises(UnusableDeviceError) as refused:
            choose_device(wanted, node=absent, environ=environ)
        assert "on your system is too old (found version 12020). Give the pod a GPU" in str(refused.value)
        assert "--device cpu" in str(refused.value)


@pytest.mark.usefixtures("no_cuda")
def test_a_machine_with_a_gpu_that_cannot_be_used_runs_on_the_cpu_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = tmp_path / "nvidia0"
    assert choose_device("auto", node=node, environ=NOT_GIVEN).type == "cpu"
    assert not caplog.records
    node.touch()
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto", node=node, environ={}).type == "cpu"
    assert "too old" in caplog.text
    assert "runs on the CPU" in caplog.text


def test_a_gpu_that_torch_can_use_is_used_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(wanted).type for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
