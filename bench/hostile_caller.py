"""What one hostile caller costs the callers of another API key, on the demo's cluster.

    python bench/hostile_caller.py [--rounds 3] [--seconds 30] [--demo .demo] [--records PATH]

It uses the cluster that `make demo` keeps running; without one the records are "not run". A caller asks a fine-tune one
question after another, in turns alone and while a process of low priority, with another key, sends all of this at
once: prompts of 4 MiB, compressed bodies that expand a thousandfold, as many requests as a base without a pod may hold,
and heads of which a byte arrives every half second. The figure is the caller's p99 over its own quiet one.
The node is cordoned meanwhile, so that the base which holds the requests gets no pod. No pod may restart.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from common.places import ROOT
from common.records import Record, against, measured, not_run, parsed, parser, percentile, report
from scale_to_zero import BASE, NO_CLUSTER, Cluster

ASLEEP = "asleep"
HOSTILE_KEY = "lp-" + "h" * 43
CALLER_TASK = "routing"
LARGE_PROMPT_BYTES = 4 * 1024 * 1024 - 1024
LARGE_PER_S, BOMBS_PER_S, HELD, SLOW_HEADS = 2, 20, 300, 100
HELD_BODY_BYTES = 64 * 1024
BOMB = gzip.compress(bytes(256 * 1024 * 1024), 9)
UNITS = {"p99_ms": "ms", "restarts": "restarts"}


# --- the hostile caller's process ----------------------------------------------------------


class Hostile:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self.answers: Counter[str] = Counter()

    async def run(self) -> None:
        """Until it is cancelled."""
        slow = (self.slow_head() for _ in range(SLOW_HEADS))
        held = (self.again(self.held, 0) for _ in range(HELD))
        await asyncio.gather(self.at_rate(self.large, LARGE_PER_S), self.at_rate(self.bomb, BOMBS_PER_S), *held, *slow)

    async def at_rate(self, ask: Callable[[], Awaitable[None]], per_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(ask())
                await asyncio.sleep(1 / per_s)

    async def again(self, ask: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            await ask()
            await asyncio.sleep(pause_s or 1)

    async def large(self) -> None:
        text = "word " * (LARGE_PROMPT_BYTES // 5)
        await self.post("large", json.dumps({"model": CALLER_TASK, "prompt": text}).encode())

    async def bomb(self) -> None:
        await self.post("bomb", BOMB, {"Content-Encoding": "gzip"})

    async def held(self) -> None:
        body = {"model": ASLEEP, "prompt": "word " * (HELD_BODY_BYTES // 5), "max_tokens": 1}
        await self.post("held", json.dumps(body).encode())

    async def slow_head(self) -> None:
        url = urlsplit(self._url)
        while True:
            try:
                _, writer = await asyncio.open_connection(url.hostname, url.port)
                for byte in b"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nX-Slow: " + b"a" * 1000:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.5)
            except OSError:
                self.answers["slow head: cut"] += 1
                await asyncio.sleep(0.5)

    async def post(self, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        given = {"Authorization": f"Bearer {HOSTILE_KEY}", "Content-Type": "application/json", **(headers or {})}
        try:
            async with self._session.post(f"{self._url}/v1/completions", data=body, headers=given) as response:
                await response.read()
                self.answers[f"{kind}: {response.status}"] += 1
        except aiohttp.ClientError as error:
            self.answers[f"{kind}: {type(error).__name__}"] += 1


async def be_hostile(url: str) -> None:
    """Until standard input ends; then prints what was answered."""
    os.nice(10)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        hostile = Hostile(session, url)
        task = asyncio.create_task(hostile.run())
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    print(json.dumps(hostile.answers))


@contextmanager
def hostile_caller(url: str) -> Iterator[None]:
    command = [sys.executable, __file__, "--hostile", url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(5)  # the base's requests are held by then
        yield
    finally:
        answers, _ = process.communicate("", timeout=60)
        print(f"  the hostile caller got {answers.strip()}", file=sys.stderr, flush=True)


# --- the cluster ---------------------------------------------------------------------------


def _apply(cluster: Cluster, manifest: dict[str, Any]) -> None:
    command = [*cluster.kubectl, "-n", manifest["metadata"]["namespace"], "apply", "-f", "-"]
    done = subprocess.run(command, input=json.dumps(manifest), text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


@contextmanager
def prepared(cluster: Cluster) -> Iterator[None]:
    """A key for the hostile caller, a base that gets no pod, and the caller's base awake throughout."""
    base = json.loads(cluster.run("get", "bm", BASE, "-o", "json"))
    namespace = base["metadata"]["namespace"]
    key = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "hostile",
            "namespace": f"{namespace}-keys",
            "labels": {"lorapool.dev/api-key": "true"},
        },
        "stringData": {"keySha256": hashlib.sha256(HOSTILE_KEY.encode()).hexdigest(), "namespaces": "*"},
    }
    asleep = {
        "apiVersion": base["apiVersion"],
        "kind": base["kind"],
        "metadata": {"name": ASLEEP, "namespace": namespace},
        "spec": {**base["spec"], "servedName": ASLEEP},
    }
    node = json.loads(cluster.run("get", "nodes", "-o", "json"))["items"][0]["metadata"]["name"]
    idle_after = cluster.idle_after("1h")
    try:
        cluster.first_token_s()
        cluster.run("cordon", node)
        _apply(cluster, key)
        _apply(cluster, asleep)
        time.sleep(5)  # the gateways know both
        yield
    finally:
        cluster.idle_after(idle_after)
        cluster.run("delete", "bm", ASLEEP, "--wait=false", "--ignore-not-found")
        cluster.run("delete", "secret", "hostile", "-n", f"{namespace}-keys", "--ignore-not-found")
        cluster.run("uncordon", node)


def restarts(cluster: Cluster) -> Counter[str]:
    """By the uid of the pod."""
    found: Counter[str] = Counter()
    for pod in json.loads(cluster.run("get", "pods", "-o", "json"))["items"]:
        for one in pod["status"].get("containerStatuses", []):
            found[pod["metadata"]["uid"]] += one["restartCount"]
    return found


# --- the caller ----------------------------------------------------------------------------


async def ask_for(cluster: Cluster, seconds: float) -> list[float]:
    """Seconds of each answer, one after another. Raises RuntimeError for any that is not 200."""
    took: list[float] = []
    ends_s = time.perf_counter() + seconds
    body = {"model": CALLER_TASK, "prompt": "My card was charged twice.", "max_tokens": 8, "temperature": 0}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {cluster.api_key}"}) as session:
        while time.perf_counter() < ends_s:
            began_s = time.perf_counter()
            async with session.post(f"{cluster.gateway_url}/v1/completions", json=body) as response:
                text = await response.text()
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {text}")
            took.append(time.perf_counter() - began_s)
    return took


def measure(summary: Path, rounds: int, seconds: float) -> list[Record]:
    cluster = Cluster.of(json.loads(summary.read_text())) if summary.is_file() else None
    if cluster is None or not cluster.up():
        return [not_run(f"hostile.{name}", unit, NO_CLUSTER) for name, unit in UNITS.items()]
    quiet: list[float] = []
    loud: list[float] = []
    with prepared(cluster):
        asyncio.run(ask_for(cluster, 5))  # loads the adapter
        before = restarts(cluster)
        for _ in range(rounds):
            quiet.append(_p99_ms(cluster, "quiet", seconds))
            with hostile_caller(cluster.gateway_url):
                loud.append(_p99_ms(cluster, "with the hostile caller", seconds))
        added = (restarts(cluster) - before).total()  # pods that left meanwhile count nothing
    note = (
        f"{LARGE_PER_S} prompts of 4 MiB and {BOMBS_PER_S} compressed bodies a second, {HELD} held, {SLOW_HEADS} heads"
    )
    return [
        against("hostile.p99_ms", UNITS["p99_ms"], loud, "quiet", quiet, note),
        measured("hostile.restarts", UNITS["restarts"], [float(added)], "of any pod of the release"),
    ]


def _p99_ms(cluster: Cluster, what: str, seconds: float) -> float:
    took = asyncio.run(ask_for(cluster, seconds))
    p50, p99 = statistics.median(took) * 1e3, percentile(took, 0.99) * 1e3
    print(f"  {what}: {len(took)} answers, p50 {p50:.0f} ms, p99 {p99:.0f} ms", file=sys.stderr, flush=True)
    return p99


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--seconds", type=float, default=30.0, help="of each half of a round")
    asked.add_argument("--demo", type=Path, default=ROOT / ".demo", help="the demo's folder")
    asked.add_argument("--hostile", metavar="URL", help=argparse.SUPPRESS)
    arguments = parsed(asked)
    if arguments.hostile:
        asyncio.run(be_hostile(arguments.hostile))
        return
    report(measure(arguments.demo / "summary.json", arguments.rounds, arguments.seconds), arguments)


if __name__ == "__main__":
    main()
