"""Many requests on one cold adapter, counted by real runtime processes and by the log of the source."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from artifact_hub import Fault, Hub
from engine_kit import peft_world, tiny_model
from fakes_runtime import save_byte_tokenizer
from runtime_process import TOKEN, RuntimeProcess, runtime_process

from lorapool_api.protocol import ResolveAnswer

LOADS = "lorapool_runtime_adapter_loads_total"


def session_with(process: RuntimeProcess) -> aiohttp.ClientSession:
    headers, connector = {"Authorization": f"Bearer {TOKEN}"}, aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(process.url, headers=headers, connector=connector)


async def register(session: aiohttp.ClientSession) -> tuple[str, str]:
    """Returns what requests name, and what answers say."""
    source = {"uri": "hf://acme/poet"}
    async with session.post("/v1/resolve", json={"source": source}) as response:
        digest = ResolveAnswer.model_validate(await response.json()).digest
    async with session.put(f"/v1/adapters/uid-poet/{digest}", json={"display": "t/poet", "source": source}) as response:
        assert response.status == 200
    return f"uid-poet@{digest}", f"t/poet@{digest}"


async def ask(session: aiohttp.ClientSession, target: str) -> tuple[int, str | None]:
    body = {"model": "x", "prompt": [72], "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body, headers={"x-lorapool-adapter": target}) as response:
        await response.read()
        return response.status, response.headers.get("x-lorapool-adapter")


async def loads(session: aiohttp.ClientSession) -> list[float]:
    """Every value of the runtime's own counter of loads."""
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(LOADS)]


@pytest.mark.parametrize(("count", "pods"), [(100, 1), pytest.param(1000, 2, marks=pytest.mark.deep)])
async def test_all_requests_on_a_cold_adapter_are_one_fetch_and_one_load_a_pod(
    count: int, pods: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = peft_world(tmp_path / "tunes", tiny_model("Llama", eos_token_id=257), {"poet": {"r": 4}})
    for file in save_byte_tokenizer(tmp_path / "tokenizer").iterdir():
        (world.base / file.name).write_bytes(file.read_bytes())
    files = {path.name: path.read_bytes() for path in (tmp_path / "tunes" / "poet").iterdir()}
    with Hub() as hub:
        hub.repos["acme/poet"] = files
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        bounds = {"max_load_waiting": 2 * count, "max_waiting": 2 * count}
        for pod in [tmp_path / f"pod-{number}" for number in range(pods)]:
            pod.mkdir()
            with runtime_process(pod, world.base, **bounds) as process:
                async with session_with(process) as session:
                    target, named = await register(session)
                    assert await loads(session) == [0.0]
                    hub.requests.clear()
                    hub.faults = [Fault("adapter_model.safetensors", delay_s=0.5)]  # all requests come before its end
                    answers = Counter(await asyncio.gather(*(ask(session, target) for _ in range(count))))
                    assert answers == {(200, named): count}
                    assert hub.bodies_sent_of("adapter_model.safetensors") == 1
                    assert await loads(session) == [1.0]
