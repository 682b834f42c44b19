"""The client of the open loops: sends each request at its scheduled time and records when tokens arrive.

One asyncio loop on loopback; the load is bounded by the list of arrivals and by a deadline for all of it. A request
that finds every adapter slot in use is sent again after the gateway's own back-off, and its time continues; one that
is answered with another error is counted, never repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

from common.records import percentile
from common.workloads import Arbaseline
from lorapool_api.common import HEADER_ADAPTER
from lorapool_api.openai import NoFreeSlotError
from lorapool_gateway.requests.dispatch import PAUSE_S


@dataclass
class Answered:
    """Times in seconds of one clock: when a request was sent, and when each chunk with text or an end arrived."""

    sent_s: float
    chunks_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None
    no_slot: int = 0
    """How often every slot was in use."""

    @property
    def first_s(self) -> float:
        return self.chunks_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """The result of one run."""

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

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between consecutive tokens, over all requests."""
        return [gap_s * 1e3 for answer in self.answers for gap_s in answer.gaps_s]

    def inter_token_s(self, share: float) -> float:
        return percentile(self.gaps_ms, share) / 1e3

    def first_within(self, limit_s: float) -> float:
        """Share of all requests, failed ones included, whose first token came within the limit."""
        return sum(bool(a.chunks_s) and a.first_s <= limit_s for a in self.answers) / len(self.answers)


def run_load(port: int, arrivals: Sequence[Arbaseline], keys: Sequence[str], deadline_s: float) -> Load:
    """`keys[i]` is the adapter header of the i-th most popular adapter."""
    return asyncio.run(_run(port, arrivals, keys, deadline_s))


async def _run(port: int, arrivals: Sequence[Arbaseline], keys: Sequence[str], deadline_s: float) -> Load:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
        began_s = time.perf_counter()
        async with asyncio.timeout(deadline_s):
            answers = await asyncio.gather(*(_one(session, began_s, arrival, keys) for arrival in arrivals))
    ends = [answer.chunks_s[-1] for answer in answers if answer.chunks_s]
    return Load(max(ends, default=time.perf_counter()) - min(answer.sent_s for answer in answers), list(answers))


async def _one(session: aiohttp.ClientSession, began_s: float, arrival: Arbaseline, keys: Sequence[str]) -> Answered:
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
    """Sends one streamed completion. `tokens` is `max_tokens` when the stream ended well, else the tokens received."""
    answered = Answered(time.perf_counter())
    try:
        while await _attempt(session, body, headers, answered):  # noqa: ASYNC110  # a server's word, not an event here
            await asyncio.sleep(PAUSE_S[min(answered.no_slot, len(PAUSE_S)) - 1])
    except (aiohttp.ClientError, OSError) as error:
        answered.error = repr(error)
    return answered


async def _attempt(
    session: aiohttp.ClientSession, body: Mapping[str, object], headers: Mapping[str, str], answered: Answered
) -> bool:
    """True if every slot was in use, so that the request is repeated; the rest goes to `answered`."""
    async with session.post("/v1/completions", json=body, headers=headers) as response:
        if response.status == NoFreeSlotError.status:
            answered.no_slot += 1
            return True
        if response.status != 200:
            answered.error = f"{response.status}: {(await response.text())[:200]}"
            return False
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                answered.tokens = int(str(body["max_tokens"]))
                return False
            if line.startswith(b"data: "):
                answered.chunks_s.append(time.perf_counter())
    answered.error = "the stream ended without [DONE]"
    return False
