"""The whole process, `python -m lorapool_runtime`, with the real engine on a tiny random base and adapters by peft."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from engine_kit import PeftWorld, peft_world, tiny_model
from fakes_runtime import save_byte_tokenizer, tokenizer_of
from runtime_process import TOKEN, runtime_process

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import ResolveAnswer, RuntimeSnapshot

CONFIGS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "big": {"r": 64, "target_modules": ["q_proj"]},
}


@dataclass
class Process:
    url: str
    popen: subprocess.Popen[bytes]
    world: PeftWorld
    pvc: Path
    tokenizer: Path
    log: Path

    async def snapshot(self, session: aiohttp.ClientSession) -> RuntimeSnapshot:
        async with session.get("/v1/runtime") as response:
            return RuntimeSnapshot.model_validate(await response.json())

    async def register(self, session: aiohttp.ClientSession, name: str, **more: Any) -> AdapterKey:
        """Resolves `pvc://tunes/<name>` and registers it, as the operator and the gateway do."""
        source = {"uri": f"pvc://tunes/{name}"}
        async with session.post("/v1/resolve", json={"source": source}) as response:
            answer = ResolveAnswer.model_validate(await response.json())
        assert answer.digest is not None, answer
        key = AdapterKey(f"uid-{name}", answer.digest)
        body = {"display": f"team/{name}", "names": [name], "source": source, **more}
        async with session.put(f"/v1/adapters/{key.uid}/{key.digest}", json=body) as response:
            assert response.status == 200
        return key


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("process")
    tunes = folder / "pvc" / "tunes"
    world = peft_world(tunes, tiny_model("Llama", eos_token_id=257), CONFIGS)
    tokenizer = save_byte_tokenizer(folder / "tokenizer")
    for file in tokenizer.iterdir():
        (world.base / file.name).write_bytes(file.read_bytes())
    (tunes / "pickled").mkdir()
    (tunes / "pickled" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tunes / "pickled" / "adapter_config.json").write_text("{}")
    settings = {"pvc_root": folder / "pvc", "host_idle_s": 0.5, "sweep_interval_s": 0.1, "drain_grace_s": 600.0}
    with runtime_process(folder, world.base, **settings) as running:
        yield Process(running.url, running.popen, world, folder / "pvc", tokenizer, running.log)


def open_session(process: Process) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(process.url, headers={"Authorization": f"Bearer {TOKEN}"})


async def complete(session: aiohttp.ClientSession, target: str, prompt: list[int], tenant: str = "") -> tuple[int, Any]:
    body = {"model": "x", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    headers = {"x-lorapool-adapter": target, "x-lorapool-tenant": tenant}
    async with session.post("/v1/completions", json=body, headers=headers) as response:
        return response.status, await response.json()


async def test_adapters_and_base_asked_at_once_answer_as_peft_does_one_by_one(process: Process) -> None:
    prompts = [[72, 105], [65, 66, 67, 68, 69], [90] * 9]
    decode = tokenizer_of(process.tokenizer).decode
    async with open_session(process) as session:
        keys: dict[str | None, str] = {None: "base"}
        for name in ("one", "two"):
            keys[name] = str(await process.register(session, name))
        wanted = [(name, prompt) for name in keys for prompt in prompts] * 2
        answers = await asyncio.gather(*(complete(session, keys[name], prompt) for name, prompt in wanted))
        for (name, prompt), (status, body) in zip(wanted, answers, strict=True):
            assert status == 200, body
            assert body["choices"][0]["text"] == decode(process.world.answer(name, prompt, 12)), name
            assert body["usage"]["completion_tokens"] == 12
        snapshot = await process.snapshot(session)
        assert {(item.display, item.state, item.tier) for item in snapshot.adapters} == {
            ("team/one", "loaded", "device"),
            ("team/two", "loaded", "device"),
        }
        assert all(item.device_bytes > 0 and item.usage.requests == 6 for item in snapshot.adapters)


async def test_a_repeated_prompt_counts_as_cached_for_the_same_weights_only(process: Process) -> None:
    prompt = [97 + i % 20 for i in range(37)]  # two full blocks of sixteen, and five tokens
    async with open_session(process) as session:
        targets = ["base", str(await process.register(session, "one")), str(await process.register(session, "two"))]
        before = await _counters(session)
        for cached in (0, 32):
            for target in targets:
                status, answer = await complete(session, target, prompt)
                assert status == 200
                assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
        after = await _counters(session)
    grown = {name: after[name] - before[name] for name in after}
    assert grown == {"queried": 6 * 37, "hit": 3 * 32}


async def test_no_answer_tells_a_tenant_that_another_one_sent_the_same_prompt(process: Process) -> None:
    prompt = [98 + i % 20 for i in range(37)]
    async with open_session(process) as session:
        for target in ("base", str(await process.register(session, "one"))):
            found = []
            for tenant in ("a", "b", "a", "b", ""):
                _, answer = await complete(session, target, prompt, tenant)
                found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert found == [0, 0, 32, 32, 0]


async def _counters(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return {
        name: float(
            next(line for line in lines if line.startswith(f"lorapool_runtime_prefix_cache_{name}_")).split()[-1]
        )
        for name in ("queried", "hit")
    }


async def test_an_idle_adapter_is_unloaded_and_answers_again(process: Process) -> None:
    async with open_session(process) as session:
        key = await process.register(session, "one", idleAfterS=0.3)
        before = await complete(session, str(key), [72, 105])

        async def unloaded() -> bool:
            report = (await process.snapshot(session)).adapter(*key)
            assert report is not None
            return (report.state, report.tier, report.device_bytes) == ("registered", "disk", 0)

        async with asyncio.timeout(20):
            while not await unloaded():  # noqa: ASYNC110  another process
                await asyncio.sleep(0.1)
        assert (await complete(session, str(key), [72, 105]))[1]["choices"] == before[1]["choices"]


async def test_unusable_files_are_refused_with_their_reason_and_the_base_still_answers(process: Process) -> None:
    async with open_session(process) as session:
        for name, reason, code in (
            ("pickled", "UnsupportedFormat", "unsupported_format"),
            ("big", "RankTooHigh", "digest_mismatch"),  # the digest below is wrong, and is checked first
            ("nothing", "SourceNotFound", "source_not_found"),
        ):
            async with session.post("/v1/resolve", json={"source": {"uri": f"pvc://tunes/{name}"}}) as response:
                answer = ResolveAnswer.model_validate(await response.json())
            assert answer.failure is not None
            assert answer.failure.reason == reason
            digest = "sha256:" + "0" * 64
            body = {"display": f"team/{name}", "source": {"uri": f"pvc://tunes/{name}"}}
            async with session.put(f"/v1/adapters/uid-{name}/{digest}", json=body) as response:
                assert response.status == 200
            status, refused = await complete(session, f"uid-{name}@{digest}", [72])
            assert (status, refused["error"]["code"]) == (422, code)
        wrong = "sha256:" + "1" * 64
        body = {"display": "team/wrong", "source": {"uri": "pvc://tunes/one"}}
        async with session.put(f"/v1/adapters/uid-wrong/{wrong}", json=body) as response:
            assert response.status == 200
        status, refused = await complete(session, f"uid-wrong@{wrong}", [72])
        assert (status, refused["error"]["code"]) == (422, "digest_mismatch")
        assert (await complete(session, "base", [72]))[0] == 200


async def test_a_chat_streams_and_ends_when_its_client_leaves(process: Process) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "ignore_eos": True}
    async with open_session(process) as session:
        async with session.post("/v1/chat/completions", json={**chat, "max_tokens": 5}) as response:
            text = (await response.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        async with session.post("/v1/chat/completions", json=chat) as response:
            await response.content.readline()
        async with asyncio.timeout(10):
            while (await process.snapshot(session)).in_flight:  # noqa: ASYNC110  another process
                await asyncio.sleep(0.05)


async def test_on_sigterm_running_requests_finish_and_the_process_exits_with_0(process: Process) -> None:
    async with open_session(process) as session:
        body = {"model": "tiny", "prompt": [72], "max_tokens": 100, "ignore_eos": True, "stream": True}
        async with session.post("/v1/completions", json=body) as response:
            await response.content.readline()
            process.popen.send_signal(signal.SIGTERM)
            rest = (await response.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in rest.split("\n") if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    await asyncio.to_thread(process.popen.wait, 600)
    log = process.log.read_text()
    assert process.popen.returncode == 0, log
    assert "Traceback" not in log
    assert TOKEN not in log


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model", "/nowhere/at/all"], 1, "is not a model folder"),
        (["--model", "ftp://x/y"], 1, "hf://org/name"),
        (["--model", "x", "--slots", "0"], 2, "LORAPOOL_RUNTIME_SLOTS"),
    ],
)
def test_a_runtime_that_cannot_start_says_why_without_a_traceback(flags: list[str], code: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorapool_runtime", "--listen-port", "0", *flags],
        capture_output=True, text=True, timeout=120, check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("LORAPOOL_")},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
