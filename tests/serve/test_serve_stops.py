"""No request is lost that arrives around the end of a base's last pod.

The operator's decisions, the gateway and the runtimes' processes are real; the engine is a fake, and `lorapool_serve`
is the cluster. Each base is stopped again and again, and for each stop one request is sent, each time at another
moment: from before the stop begins until after the process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from forked_runtimes import NOTICE_S, expected, forking
from serve_kit import Served, adapter, base, serving

IDLE_S = 1.0
AROUND_S = 0.3
"""Requests are sent from this long before the stop until this long after the end of the process."""
COLD_START = "x-lorapool-cold-start-ms"


SLEEP, END = "scale to zero", "termination"


@dataclass
class Tally:
    """The outcomes of all trials by kind."""

    asked: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    """Answered by the next process; the others were answered by the one that was about to end."""
    lost: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    with forking(tmp_path_factory.mktemp("fork")) as made:
        yield made


class Client:
    """Asks one adapter by the gateway, over one connection pool."""

    def __init__(self, served: Served, session: aiohttp.ClientSession, name: str) -> None:
        summary = served.summary()
        self._url = summary["gateway_url"] + "/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {summary['api_key']}"}
        self._session = session
        self._name = name

    async def ask(self, *, stream: bool = False, after_s: float = 0.0) -> tuple[str, bool]:
        """(what is wrong with the answer, whether the request was held)."""
        await asyncio.sleep(after_s)
        body = {"model": self._name, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        try:
            async with self._session.post(self._url, json=body, headers=self._headers) as response:
                text, held = await response.text(), COLD_START in response.headers
        except aiohttp.ClientError as error:
            return repr(error), False
        if response.status != 200:
            return f"{response.status} {text[:300]}", held
        said = streamed(text) if stream else json.loads(text)["choices"][0]["message"]["content"]
        return ("" if said == expected(self._name) else f"wrong answer {text[-300:]!r}"), held


def streamed(text: str) -> str:
    """The text of a stream; empty if it is not complete."""
    *events, last = [line.removeprefix("data: ") for line in text.splitlines() if line]
    if last != "[DONE]":
        return ""
    choices = [choice for event in events for choice in json.loads(event).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def processes_of(served: Served, name: str) -> list[int]:
    label = f"LORAPOOL_RUNTIME_BASE_LABEL=default/{name}-base".encode()
    children = Path(f"/proc/{served.popen.pid}/task/{served.popen.pid}/children").read_text().split()
    return [int(pid) for pid in children if label in environment(pid)]


def environment(pid: str) -> list[bytes]:
    """Of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


async def end(pids: list[int], after_s: float) -> None:
    """What the kubelet does to a pod that is evicted or deleted. It may have fallen asleep by itself meanwhile."""
    await asyncio.sleep(after_s)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


async def trial(
    served: Served, client: Client, name: str, kind: str, offset_s: float, *, stream: bool
) -> tuple[str, bool]:
    """One request, `offset_s` after the begin of the stop. An idle base is stopped by the operator."""
    wrong, held = await client.ask()
    if wrong:
        return f"before the stop: {wrong}", held
    if kind == SLEEP:
        return await client.ask(stream=stream, after_s=IDLE_S + offset_s)
    pids = processes_of(served, name)
    answer, _ = await asyncio.gather(client.ask(stream=stream, after_s=AROUND_S + offset_s), end(pids, AROUND_S))
    return answer


async def trials(served: Served, name: str, offsets: Sequence[float], tally: Tally) -> None:
    async with aiohttp.ClientSession() as session:
        client = Client(served, session, name)
        for number, offset_s in enumerate(offsets):
            for kind in (SLEEP, END):
                stream = (number + (kind == END)) % 2 == 0
                wrong, held = await trial(served, client, name, kind, offset_s, stream=stream)
                tally.asked[kind] += 1
                tally.held[kind] += held
                if wrong:
                    print(kind, offset_s, wrong)
                    tally.lost.append(f"{kind} {offset_s:+.3f} s, {'stream' if stream else 'whole'}: {wrong}")


async def run(served: Served, names: Sequence[str], offsets: Sequence[float]) -> Tally:
    """Two trials for each offset, spread over the bases, which are stopped independently of each other."""
    tally = Tally()
    await asyncio.gather(
        *(trials(served, name, offsets[index :: len(names)], tally) for index, name in enumerate(names))
    )
    return tally


def write(served: Served, names: Sequence[str]) -> None:
    scaling = {"minReplicas": 0, "idleAfter": f"{IDLE_S:g}s"}
    for name in names:
        served.write(f"{name}.yaml", base(f"{name}-base", scaling=scaling), adapter(name, base=f"{name}-base"))


@pytest.mark.parametrize(
    ("notice_s", "bases", "offsets"),
    [
        (0.15, 3, 6),
        pytest.param(0.15, 8, 112, marks=pytest.mark.deep),
        pytest.param(1.0, 8, 112, marks=pytest.mark.deep),
    ],
)
async def test_no_request_around_the_end_of_the_last_pod_is_lost(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: pytest.RecordProperty,
    notice_s: float,
    bases: int,
    offsets: int,
) -> None:
    monkeypatch.setenv(NOTICE_S, str(notice_s))
    folder, names = tmp_path / "objects", [f"tune{number}" for number in range(bases)]
    folder.mkdir()
    with serving(folder, tmp_path / "serve", command) as served:
        write(served, names)
        await asyncio.to_thread(served.until, lambda: all(f"default/{name}" in models(served) for name in names))
        span_s = notice_s + 2 * AROUND_S
        tally = await run(served, names, [span_s * step / (offsets - 1) - AROUND_S for step in range(offsets)])
        log = (served.state / "serve.log").read_text()
    print(f"notice {notice_s} s: {dict(tally.asked)} asked, {dict(tally.held)} held, {len(tally.lost)} lost")
    record_property("requests around an end", tally.asked.total())
    assert tally.lost == [], log[-4000:]
    assert 0 < tally.held[END] < tally.asked[END], "every request was on the same side of the stop"


def models(served: Served) -> list[str]:
    return served.summary()["models"] if (served.state / "summary.json").exists() else []
