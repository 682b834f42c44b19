"""Runs the requirements of engines on vLLM, in vLLM's own environment: its build for CPUs. And the runtime on it.

`make test` makes the environment (6 GB); without it these tests are skipped (`make vllm`). One engine runs all
requirements: most of the two minutes are vLLM's start, which imports it in four processes. All is in one file, so that
one vLLM runs at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from engine_kit import PeftWorld, peft_world, tiny_model
from engines.baselines import vllm_python
from engines.over_http import free_port, status_of, wait_until
from fakes_runtime import save_byte_tokenizer
from model_zoo import PAGE
from tokenizers import Tokenizer
from vllm_kit import ROOT, START_S, VllmProcess, environ, vllm_process, wait_until_gone

PYTHON = vllm_python()
pytestmark = pytest.mark.skipif(PYTHON is None, reason="vLLM's environment is not made: make vllm")
PROMPT = [5, 9, 17, 33]
TOKENS = 8


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


@pytest.mark.deep
def test_vllm_serves_what_the_page_says() -> None:
    words = ["Llama 2", "Qwen 2, 2.5", "Gemma 1"]
    command = [str(PYTHON), "tests/support/vllm_zoo.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environ(), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    said = {line[0]: line[-1] for line in lines if line[0] in found}
    assert len(said) == len(words)
    assert {models: text.partition(" (")[0] for models, text in found.items()} == said


@pytest.fixture
def world(tmp_path: Path) -> PeftWorld:
    adapters = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "two": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    }
    made = peft_world(tmp_path / "claim", tiny_model("Llama", head_dim=32), adapters)
    save_byte_tokenizer(made.base)
    return made


def settings(folder: Path, world: PeftWorld, port: int) -> dict[str, Any]:
    return {
        "model": world.base, "served-name": "tiny", "dtype": "float32", "slots": 2, "max-batch": 4, "max-rank": 8,
        "kv-bytes": 64 << 20, "listen-port": port, "cache-dir": folder / "cache", "threads": 1, "pvc-root": folder,
        "sweep-interval-s": 0.2,
    }  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, world: PeftWorld) -> Iterator[tuple[VllmProcess, int]]:
    """The runtime's process, and its port; ready."""
    port = free_port()
    with vllm_process(tmp_path, "runtime", settings(tmp_path, world, port)) as made:
        wait_until(lambda: status_of(port, "/readyz") == 200, made.process, START_S)
        yield made, port


@pytest.mark.deep
@pytest.mark.parametrize(
    ("changed", "reason", "words"),
    [
        ({"kv-bytes": 4096}, "DeviceMemoryTooSmall", "lower spec.lora.slots"),  # an error of vLLM's engine process
        ({"tensor-parallel": 3}, "GPUCountMismatch", "divides the attention heads"),  # of its configuration
    ],
)
def test_a_start_that_fails_ends_with_a_reason_and_a_remedy_and_leaves_no_process(
    tmp_path: Path, world: PeftWorld, changed: dict[str, Any], reason: str, words: str
) -> None:
    with vllm_process(tmp_path, "runtime", settings(tmp_path, world, free_port()) | changed) as made:
        assert made.process.wait(START_S) == 1
        assert made.reasons[-1][0] == reason
        assert words in made.reasons[-1][1]
        assert not wait_until_gone(made.session())


@pytest.mark.deep
async def test_a_killed_runtime_takes_vllms_processes_with_it(server: tuple[VllmProcess, int]) -> None:
    processes = server[0].tree()
    assert len(processes) >= 3  # the runtime, vLLM's engine and its worker
    server[0].process.kill()
    server[0].process.wait()
    assert not wait_until_gone(processes)


async def load(session: aiohttp.ClientSession, name: str) -> str:
    """Loads an adapter; returns its digest."""
    source = {"uri": f"pvc://claim/{name}"}
    async with session.post("/v1/resolve", json={"source": source}) as response:
        resolved = await response.json()
        assert resolved["digest"], resolved["failure"]
    digest: str = resolved["digest"]
    descriptor = {"display": f"team/{name}", "source": source}
    async with session.put(f"/v1/adapters/{name}/{digest}", json=descriptor) as response:
        assert response.status == 200, await response.text()
    return digest


@pytest.mark.deep
async def test_when_vllms_process_dies_every_reader_is_told_and_the_runtime_exits_with_1(
    server: tuple[VllmProcess, int],
) -> None:
    process, port = server[0].process, server[1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        digest = await load(session, "one")

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


# --- a group: two runtimes on one machine, each with half of the layers or half of each layer ------


@contextlib.contextmanager
def group(folder: Path, world: PeftWorld, **parallel: Any) -> Iterator[tuple[VllmProcess, VllmProcess, int]]:
    """(leader, worker, port of the leader); the leader is ready."""
    port, meeting = free_port(), free_pair()
    given = settings(folder, world, port) | {"group-port": meeting, **parallel}
    env = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    lws = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "localhost"}
    with (
        vllm_process(folder, "worker", given, **env, **lws, LWS_WORKER_INDEX="1") as worker,
        vllm_process(folder, "leader", given, **env, **lws, LWS_WORKER_INDEX="0") as leader,
    ):
        wait_until(lambda: status_of(port, "/readyz") == 200, leader.process, START_S)
        yield leader, worker, port


def free_pair() -> int:
    """A port whose next one is free too."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("", port)), socket.create_server(("", port + 1)):
            return port


async def answer(session: aiohttp.ClientSession, model: str, key: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body, headers={"x-lorapool-adapter": key}) as response:
        assert response.status == 200, await response.text()
        answered = await response.json()
        text: str = answered["choices"][0]["text"]
        return text


@pytest.mark.parametrize("parallel", ["pipeline-parallel", pytest.param("tensor-parallel", marks=pytest.mark.deep)])
async def test_two_nodes_answer_as_one_process_and_end_when_a_worker_is_lost(
    tmp_path: Path, world: PeftWorld, parallel: str
) -> None:
    tokenizer = Tokenizer.from_file(str(world.base / "tokenizer.json"))
    with group(tmp_path, world, **{parallel: 2}) as (leader, worker, port):
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            keys = {name: f"{name}@{await load(session, name)}" for name in world.adapters}
            for name, key in {None: "base", **keys}.items():
                wanted = tokenizer.decode(world.answer(name, PROMPT, TOKENS))
                assert await answer(session, name or "tiny", key) == wanted, name
        processes = leader.tree() | worker.tree()
        assert len(processes) >= 5  # two runtimes, vLLM's engine, and a process of each node
        os.kill(worker.process.pid, signal.SIGKILL)
        assert leader.process.wait(120) == 1
        assert [reason for reason, _ in leader.reasons][-1] == "GroupEnded"
        assert "Worker 1 of the group is lost" in leader.reasons[-1][1]
        assert not wait_until_gone(processes)
