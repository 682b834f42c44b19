"""`kill -9` of a real runtime at named points and at moments chosen at run time: every sampled token is in one record.

The witness is a wrapper of the engine that writes each token to its own file (`engine_witness`). The processes of one
chain share the folder of their records, as the containers of a pod do that is restarted; no reader acknowledges any.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from accounts_kit import minutes_of, requests_of, sums
from engine_kit import tiny_model
from engine_witness import POINTS
from fakes_runtime import save_byte_tokenizer
from runtime_process import TOKEN, RuntimeProcess, runtime_process

from lorapool_api.usage_protocol import CheckpointRecord, Ended, EndRecord, RuntimeRecord, UsagePage

PROGRAM = str(Path(__file__).parents[2] / "support" / "engine_witness.py")
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
NEW_FILE = ("after a new file is written", "after a new file took its place")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("Llama", eos_token_id=257, max_position_embeddings=2048).save_pretrained(folder)
    return save_byte_tokenizer(folder)


async def ask(session: aiohttp.ClientSession, url: str, number: int, rng: random.Random) -> None:
    """A request whose prompt is its number; some clients leave, some want two answers, some share a prefix."""
    prompt = [*([7] * 40 if number % 3 == 0 else []), *(1 + int(digit) for digit in f"{number:06d}")]
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": 5 + number % 60, "n": 1 + number % 2, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    headers = HEADERS | {"x-lorapool-attempt": f"attempt-{number}"}
    leaves_after = rng.randrange(1, 20) if number % 5 == 0 else None
    try:
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            async for _line in response.content:
                if leaves_after is not None:
                    leaves_after -= 1
                    if leaves_after == 0:
                        return
    except (aiohttp.ClientError, OSError, TimeoutError):
        return


async def load(process: RuntimeProcess, first: int, *, acknowledge: bool, rng: random.Random) -> int:
    """Sends requests, 8 at a time, until the process is dead; returns the number of the next one."""
    number = first

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal number
        while process.popen.poll() is None and number - first < 400:
            number += 1
            await ask(session, process.url, number, rng)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        clients = [asyncio.create_task(client(session)) for _ in range(8)]
        if acknowledge:  # so that there is something to leave out when the file is written again
            while process.popen.poll() is None and not all(one.done() for one in clients):
                await asyncio.sleep(0.3)
                await acknowledged(session, process.url)
        await asyncio.gather(*clients)
    return number


KEPT: dict[str, list[RuntimeRecord]] = {}


async def acknowledged(session: aiohttp.ClientSession, url: str) -> None:
    try:
        page = await read(session, url, {})
        KEPT.setdefault(page.boot_id, []).extend(page.records)
        if page.records:
            params = {"boot": page.boot_id, "through": str(page.records[-1].seq)}
            await session.delete(f"{url}/v1/usage", params=params, headers=HEADERS)
    except (aiohttp.ClientError, OSError):
        return


async def read(session: aiohttp.ClientSession, url: str, params: dict[str, str]) -> UsagePage:
    async with session.get(f"{url}/v1/usage", params=params, headers=HEADERS) as response:
        assert response.status == 200
        return UsagePage.model_validate_json(await response.read())


async def read_all(url: str) -> dict[str, list[RuntimeRecord]]:
    """All records by process: those that were acknowledged and those that are kept."""
    found = {boot_id: list(records) for boot_id, records in KEPT.items()}
    async with aiohttp.ClientSession() as session:
        for boot in (await read(session, url, {})).boots:
            after = 0
            while page := (await read(session, url, {"boot": boot.boot_id, "after": str(after)})).records:
                found.setdefault(boot.boot_id, []).extend(page)
                after = page[-1].seq
            found.setdefault(boot.boot_id, [])
    return found


def witnessed(file: Path) -> Counter[int]:
    """Sampled tokens by the number of the request."""
    found: Counter[int] = Counter()
    for line in file.read_text().splitlines():
        prompt, _token = json.loads(line)
        found[int("".join(str(one - 1) for one in prompt[-6:]))] += 1
    return found


def agree(records: list[RuntimeRecord], seen: Counter[int]) -> None:
    """Compares the records of all processes with the witness, and the parts of each process with each other."""
    requests = [one for one in requests_of(records) if one.attempt.startswith("attempt-")]
    by_number = Counter({int(one.attempt.removeprefix("attempt-")): one.completion_tokens for one in requests})
    assert len(by_number) == len(requests), "an attempt has two records"
    assert +by_number == seen
    for one in requests:
        number = int(one.attempt.removeprefix("attempt-"))
        if one.completion_tokens:
            assert one.prompt_tokens == (46 if number % 3 == 0 else 6)  # once, for one answer or two
        assert one.sequences == 1 + number % 2
        assert one.cached_tokens <= one.prompt_tokens


def consistent(records: list[RuntimeRecord]) -> None:
    seqs = [one.seq for one in records]
    assert seqs == sorted(set(seqs))
    for one in records:
        if isinstance(one, CheckpointRecord):
            expected = sums(records, up_to=one.seq)[one.uid]
            assert (one.requests, one.completion_tokens, one.gpu_ns) == (
                expected["requests"], expected["completion_tokens"], expected["gpu_ns"],
            )  # fmt: skip
    for minute in minutes_of(records):
        assert minute.busy_ns == sum(line.gpu_ns for line in minute.lines) <= minute.uptime_ns


async def chain(
    base: Path, folder: Path, kills: list[tuple[str, int]], rng: random.Random
) -> dict[str, list[RuntimeRecord]]:
    """Runs and kills one process after the other; returns the records of each, as the last one has them."""
    file, number = folder / "witness", 0
    for at, (point, count) in enumerate(kills):
        own = folder / f"process-{at}"
        own.mkdir()
        program = (PROGRAM, str(file), point, str(count))
        with runtime_process(own, base, program=program, usage_dir=folder / "usage") as process:
            number = await load(process, number, acknowledge=point in NEW_FILE, rng=rng)
            assert process.popen.wait(timeout=60) == -9, process.log.read_text()
    (folder / "last").mkdir()
    with runtime_process(folder / "last", base, usage_dir=folder / "usage") as process:
        return await read_all(process.url)


async def test_every_token_is_in_one_record_of_a_process_that_is_killed(base: Path, tmp_path: Path) -> None:
    rng = random.Random()  # other points each time
    await every_token_is_in_one_record(base, tmp_path, rng, ["token", rng.choice(POINTS[1:5])])


@pytest.mark.deep  # eight processes
async def test_every_token_is_in_one_record_wherever_the_process_is_killed(base: Path, tmp_path: Path) -> None:
    await every_token_is_in_one_record(base, tmp_path, random.Random(), [*POINTS[:5], *NEW_FILE])


async def every_token_is_in_one_record(base: Path, folder: Path, rng: random.Random, points: list[str]) -> None:
    KEPT.clear()
    counts = {"token": rng.randrange(200, 800), **dict.fromkeys(NEW_FILE, 1)}
    kills = [(point, counts.get(point) or rng.randrange(3, 30)) for point in points]
    found = await chain(base, folder, kills, rng)
    *killed, _present = [{one.seq: one for one in records} for records in found.values()]
    assert len(killed) == len(kills)
    everything: list[RuntimeRecord] = []
    for boot in killed:
        records = [boot[seq] for seq in sorted(boot)]
        consistent(records)
        end = records[-1]
        assert isinstance(end, EndRecord)
        assert end.killed
        everything += records
    assert any(one.outcome is Ended.LOST and one.completion_tokens for one in requests_of(everything)), kills
    agree(everything, witnessed(folder / "witness"))
