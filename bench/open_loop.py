"""The client of the open loops: sends each request at its time, whatever the others do, and notes when tokens come.

Used by `w2`. One asyncio loop on loopback; the load is bounded by the list of arrivals and by a deadline for all of it.
A request that is answered with an error is counted, never repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
from kit import percentile
from workloads import Arrival

from lorapool_api.common import HEADER_ADAPTER


@dataclass
class Answered:
    """Seconds on one clock: when it was sent, and when each chunk with text or an end came."""

    sent_s: float
    chunks_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def first_s(self) -> float:
        return self.chunks_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """What one run gave."""

    seconds: float
    """From the first request sent to the last token received."""
    answers: list[Answered]

    @property
    def errors(self) -> int:
        return sum(answer.error is not None for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds

    def first_token_s(self, share: float) -> float:
        return percentile([answer.first_s for answer in self.answers if answer.chunks_s], share)

    def inter_token_s(self, share: float) -> float:
        return percentile([gap for answer in self.answers for gap in answer.gaps_s], share)

    def first_within(self, limit_s: float) -> float:
        """Share of all requests, failed ones included, whose first token came within the limit."""
        return sum(bool(a.chunks_s) and a.first_s <= limit_s for a in self.answers) / len(self.answers)


def run_load(port: int, arrivals: Sequence[Arrival], keys: Sequence[str], deadline_s: float) -> Load:
    """`keys[i]` is the adapter header of the i-th most popular adapter."""
    return asyncio.run(_run(port, arrivals, keys, deadline_s))


async def _run(port: int, arrivals: Sequence[Arrival], keys: Sequence[str], deadline_s: float) -> Load:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
        began_s = time.perf_counter()
        async with asyncio.timeout(deadline_s):
            answers = await asyncio.gather(*(_one(session, began_s, arrival, keys) for arrival in arrivals))
    ends = [answer.chunks_s[-1] for answer in answers if answer.chunks_s]
    return Load(max(ends) - min(answer.sent_s for answer in answers), list(answers))


async def _one(session: aiohttp.ClientSession, began_s: float, arrival: Arrival, keys: Sequence[str]) -> Answered:
    await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
    body = {
        "model": "base",
        "prompt": list(arrival.prompt),
        "max_tokens": arrival.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    return await stream(session, body, {HEADER_ADAPTER: keys[arrival.adapter]})


async def stream(session: aiohttp.ClientSession, body: Mapping[str, object], headers: Mapping[str, str]) -> Answered:
    """One streamed completion. `tokens` is `max_tokens` when the stream ended well, else what came."""
    answered = Answered(time.perf_counter())
    try:
        async with session.post("/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                answered.error = f"{response.status}: {(await response.text())[:200]}"
                return answered
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    answered.tokens = int(str(body["max_tokens"]))
                    return answered
                if line.startswith(b"data: "):
                    answered.chunks_s.append(time.perf_counter())
        answered.error = "the stream ended without [DONE]"
    except (aiohttp.ClientError, OSError) as error:
        answered.error = repr(error)
    return answered
