"""Runs the requirements of engines on vLLM, in vLLM's own environment: its build for CPUs.

The environment takes 6 GB, so `make test` runs this only where it has been made (`make vllm`); `make test-deep` makes
it. One engine runs all tests of the file: most of the two minutes are vLLM's start, which imports it in four processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from engine_kit import peft_world, tiny_model
from engines.baselines import vllm_python
from fakes_runtime import save_byte_tokenizer

ROOT = Path(__file__).resolve().parents[3]
PYTHON = vllm_python()
pytestmark = pytest.mark.skipif(PYTHON is None, reason="vLLM's environment is not made: make vllm")


def environ() -> dict[str, str]:
    paths = ("crds", "operator", "runtime", "tests/support", "tests/support/worlds", "bench")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAPOOL_TEST"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LORAPOOL_TEST_ENGINE": "vllm",
        "OMP_NUM_THREADS": "1",
    }


def conformance(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest's run of the file, with none of the settings that need packages of our own environment."""
    file = "tests/runtime/engine/test_engine_conformance.py"
    command = [str(PYTHON), "-m", "pytest", "-q", file, "-p", "no:cacheprovider", "-o", "filterwarnings="]
    return subprocess.run(
        [*command, "--basetemp", str(folder / "vllm"), "--tb=short", *options],
        cwd=ROOT, env=environ(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_vllm_passes_all_requirements_of_engines(tmp_path: Path) -> None:
    done = conformance(tmp_path)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]


# --- the shipped server on vLLM -------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The runtime's process, and its port; ready."""
    from engines.over_http import free_port, status_of, wait_until

    one = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    world = peft_world(tmp_path / "claim", tiny_model("Llama", head_dim=32), {"one": one})
    save_byte_tokenizer(world.base)
    port = free_port()
    settings = {
        "model": world.base, "served-name": "tiny", "engine": "vllm", "dtype": "float32", "slots": 2, "max-batch": 4,
        "max-rank": 8, "kv-bytes": 64 << 20, "listen-port": port, "cache-dir": tmp_path / "cache", "threads": 1,
        "pvc-root": tmp_path, "sweep-interval-s": 0.2,
    }  # fmt: skip
    command = [str(PYTHON), "-m", "lorapool_runtime"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environ(), stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: status_of(port, "/readyz") == 200, process, 900)
        yield process, port
    finally:
        with contextlib.suppress(ProcessLookupError):  # vLLM's processes are of the same group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        sys.stdout.write((tmp_path / "log").read_text()[-4000:])


@pytest.mark.deep
async def test_when_vllms_process_dies_every_reader_is_told_and_the_runtime_exits_with_1(
    server: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = server
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        source = {"uri": "pvc://claim/one"}
        async with session.post("/v1/resolve", json={"source": source}) as response:
            resolved = await response.json()
            assert resolved["digest"], resolved["failure"]
        digest = resolved["digest"]
        descriptor = {"display": "team/one", "source": source}
        async with session.put(f"/v1/adapters/one/{digest}", json=descriptor) as response:
            assert response.status == 200, await response.text()

        async def read(model: str, key: str) -> list[str]:
            body = {"model": model, "prompt": [5, 9, 17], "max_tokens": 100, "stream": True, "ignore_eos": True}
            headers = {"x-lorapool-adapter": key}
            async with session.post("/v1/completions", json=body, headers=headers) as response:
                assert response.status == 200
                return [line.decode() async for line in response.content if line.strip()]

        whole = await read("one", f"one@{digest}")
        assert whole[-1].strip() == "data: [DONE]"
        reading = [asyncio.create_task(read("tiny", "base")) for _ in range(6)]
        await asyncio.sleep(0.3)
        os.kill(engine_core_of(process.pid), signal.SIGKILL)
        for lines in await asyncio.gather(*reading, return_exceptions=True):
            if isinstance(lines, BaseException) or lines[-1].strip() == "data: [DONE]":
                continue  # cut off, or finished before
            assert "error" in json.loads(lines[-1].removeprefix("data: "))
    assert await asyncio.to_thread(process.wait, 120) == 1


def engine_core_of(pid: int) -> int:
    """The process of vLLM's engine: it names itself."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and "EngineCore" in (folder / "cmdline").read_text():
                return int(folder.name)
        except (OSError, IndexError, ValueError):
            continue
    raise AssertionError("vLLM's engine process was not found")
