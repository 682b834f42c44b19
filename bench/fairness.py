"""What an adapter that floods a runtime costs the others, and how slots are shared by more adapters than fit.

    python bench/fairness.py BASE_FOLDER [--dtype float32|bfloat16] [--device auto|cpu|cuda] [--rounds 3]

Flood: seven adapters send one request after another, quiet and with an eighth that keeps far more requests open than
the batch holds, with answers several times as long. Rounds alternate within one runtime; the figure is the p99 of the
others with the flood over their quiet p99. Slots: sixteen adapters on four slots, each always with requests; the figure
is the smallest share of the answers over the fair one.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from common.places import make_adapter
from common.records import Record, against, measured, parsed, parser, percentile, report
from engines.standalone import Standalone

from lorapool_api.common import HEADER_ADAPTER

OTHERS, HOT, SLOTS = 7, 16, 4
NEW, FLOOD_NEW = 32, 128
FLOOD = 64
"""Requests that the flooding adapter keeps open."""
CLAIM = "tunes"


class NoSlotError(Exception):
    """The adapter got no slot within the runtime's `slot_wait_s`."""


class Clients:
    def __init__(self, session: aiohttp.ClientSession, keys: dict[str, str]) -> None:
        self._session = session
        self._keys = keys
        self.refused = 0
        """Requests that were answered 409, since their adapter got no slot in time."""

    async def ask(self, name: str, new: int, number: int = 0) -> float:
        """Seconds of one answer. Raises NoSlotError for a 409."""
        body = {
            "model": "base", "prompt": [5 + (number * 7 + i) % 1000 for i in range(16)],
            "max_tokens": new, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        began_s = time.perf_counter()
        headers = {HEADER_ADAPTER: self._keys[name]}
        async with self._session.post("/v1/completions", json=body, headers=headers) as response:
            if response.status == 409:
                raise NoSlotError
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {await response.text()}")
            await response.read()
        return time.perf_counter() - began_s

    async def others(self, seconds: float) -> list[float]:
        """Seconds of every answer of the seven adapters, one after another each."""
        ends_s, took = time.perf_counter() + seconds, []

        async def one(name: str) -> None:
            number = 0
            while time.perf_counter() < ends_s:
                number += 1
                took.append(await self.ask(name, NEW, number))

        await asyncio.gather(*(one(f"a{number}") for number in range(OTHERS)))
        return took

    async def flooded(self, seconds: float) -> list[float]:
        """The same while the eighth adapter floods the runtime."""

        async def flood(number: int) -> None:
            while True:
                await self.ask(f"a{OTHERS}", FLOOD_NEW, number)

        floods = [asyncio.create_task(flood(number)) for number in range(FLOOD)]
        await asyncio.sleep(2)  # the batch is full
        took = await self.others(seconds)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return took

    async def shares(self, seconds: float) -> float:
        """The smallest number of answers of a hot adapter over the fair one."""
        ends_s, answers = time.perf_counter() + seconds, Counter[str]()

        async def hot(name: str) -> None:
            while time.perf_counter() < ends_s:
                try:
                    await self.ask(name, 8)
                    answers[name] += 1
                except NoSlotError:
                    self.refused += 1

        names = [f"a{number}" for number in range(HOT)]
        await asyncio.gather(*(hot(name) for name in names for _ in range(2)))
        return min(answers[name] for name in names) / (answers.total() / HOT)


async def flood_records(port: int, keys: dict[str, str], rounds: int, seconds: float) -> list[Record]:
    async with _session(port) as session:
        clients = Clients(session, keys)
        await clients.others(1)
        quiet, flooded = [], []
        for _ in range(rounds):
            quiet.append(percentile(await clients.others(seconds), 0.99) * 1e3)
            flooded.append(percentile(await clients.flooded(seconds), 0.99) * 1e3)
    note = f"{OTHERS} adapters with {NEW} tokens each; flood: {FLOOD} open requests with {FLOOD_NEW} tokens"
    return [against("fairness.others_p99_ms", "ms", flooded, "quiet", quiet, note)]


async def share_records(port: int, keys: dict[str, str], rounds: int, seconds: float) -> list[Record]:
    async with _session(port) as session:
        clients = Clients(session, keys)
        runs = [await clients.shares(seconds) for _ in range(rounds)]
    note = f"{HOT} hot adapters on {SLOTS} slots; {clients.refused} requests refused"
    return [measured("fairness.smallest_share", "of fair", runs, note)]


def _session(port: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0))


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("base", type=Path)
    asked.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    asked.add_argument("--seconds", type=float, default=15.0, help="of each part of a round")
    asked.add_argument("--rounds", type=int, default=3)
    given = parsed(asked)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        volumes = Path(scratch, "volumes")
        names = [f"a{number}" for number in range(HOT)]
        for number, name in enumerate(names):
            make_adapter(given.base, volumes / CLAIM / name, number, 16)
        engine: dict[str, Any] = {"dtype": given.dtype, "device": given.device, "max_batch": 16, "max_model_len": 512}
        for measure, slots in ((flood_records, OTHERS + 1), (share_records, SLOTS)):
            cache = Path(scratch, f"cache-{slots}")
            with Standalone(given.base, volumes, cache, {**engine, "slots": slots}, f"fairness-{slots}") as server:
                server.wait_until_ready()
                keys = server.register(CLAIM, names, idleAfterS=3600)
                records += asyncio.run(measure(server.port, keys, given.rounds, given.seconds))
    report(records, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
