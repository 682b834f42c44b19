"""Gateways, runtimes and a ledger as processes on one fake API server, clients that count, and kills at any moment.

What is true is what the witnesses say: each runtime's engine writes every token to a file of its own
(`witness_runtime`), and each client counts what it receives. Neither shares code with the ledger.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import kill_points
from engine_kit import peft_world, tiny_model
from fakes_runtime import save_byte_tokenizer
from gateway_world import FakeKube, adapter_object, base_object, ready_status
from ledger_process import RUNTIME_MASTER, LedgerProcess
from pods import owner_objects, pod_object
from runtime_process import free_port

from lorapool_api.protocol import runtime_token, token_sha256

BASE_UID = "base-demo-tiny"
ADAPTERS = {"one": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "two": {"r": 8, "target_modules": ["q_proj"]}}
WITNESS = Path(__file__).parent / "witness_runtime.py"
START_TIMEOUT_S = 300.0


@dataclass
class Program:
    """A process that is killed and started again with the same folder and ports."""

    name: str
    arguments: list[str]
    environ: dict[str, str]
    ready_url: str
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self, *, may_die: bool = False) -> None:
        """Starts it and waits until it is ready. `may_die`: or has ended."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *self.arguments, env=self.environ, stdout=log, stderr=log
            )
        async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as session:
            while not (may_die and self.process.returncode is not None):
                assert self.process.returncode is None, self.log.read_text()[-3000:]
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(self.ready_url) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.05)

    async def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            await self.process.wait()

    async def kill_and_start(self) -> None:
        await self.kill()
        await self.start()


@dataclass
class Answer:
    """What a client knows of one of its requests."""

    request_id: str
    whole: bool = False
    """The answer arrived to its end."""
    left: bool = False
    """The client closed the connection itself."""
    completion_tokens: int = 0
    prompt_tokens: int = 0
    status: int = 0
    took_s: float = 0.0


@dataclass
class Deployment:
    folder: Path
    kube: FakeKube
    ledger: LedgerProcess
    gateways: list[Program]
    gateway_urls: list[str]
    runtimes: list[Program]
    answers: list[Answer] = field(default_factory=list)
    over: bool = False
    """No further requests are sent."""
    patient: bool = True
    """Clients wait for a gateway that has no process, as another replica would be asked."""
    gates: list[tuple[int, asyncio.Event]] = field(default_factory=list)
    """Numbers of requests that are not sent before the event: a kill that is to come while those before them run."""

    def computed(self) -> dict[str, tuple[int, int, int]]:
        """By attempt: prompt, cached and sampled tokens, as the engines' witnesses wrote them."""
        sequences: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
        for path in self.folder.glob("witness-*.log"):
            for line in path.read_text().splitlines():
                attempt, sequence, *counts = line.split(" ")
                prompt, cached, completion = map(int, counts)
                before = sequences[attempt].get(sequence, (0, 0, 0))
                sequences[attempt][sequence] = (
                    max(before[0], prompt),
                    max(before[1], cached),
                    max(before[2], completion),
                )
        return {
            attempt: (
                max(counts[0] for counts in of.values()),
                max(counts[1] for counts in of.values()),
                sum(counts[2] for counts in of.values()),
            )
            for attempt, of in sequences.items()
        }

    async def ask(self, session: aiohttp.ClientSession, number: int, choose: random.Random) -> Answer:
        """One request, of a kind that `choose` draws: streamed or whole, base or adapter, one or two answers."""
        answer = Answer(f"request-{number}")
        self.answers.append(answer)
        stream, leaves = choose.random() < 0.5, choose.random() < 0.1
        body: dict[str, Any] = {
            "model": choose.choice(["tiny", "one", "two"]),
            "prompt": "a shared beginning of sixteen " * choose.choice([0, 1, 2]) + str(choose.random()),
            "max_tokens": 64 if leaves else choose.randint(1, 24),
            "temperature": 0,
            "ignore_eos": True,
            "n": choose.choice([1, 1, 1, 2]),
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": answer.request_id}
        url = self.gateway_urls[number % len(self.gateway_urls)] + "/v1/completions"
        leave_after = choose.randint(1, 10) if leaves else 10**9
        began_s = time.monotonic()
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
            async with asyncio.timeout(120), await self._posted(session, url, body, headers) as response:
                answer.status = response.status
                if not stream and leaves:
                    answer.left = True
                    response.close()
                elif not stream:
                    self._count(answer, await response.json())
                    answer.whole = response.status == 200
                else:
                    events = 0
                    async for line in response.content:
                        if not line.startswith(b"data: "):
                            continue
                        if line.strip() == b"data: [DONE]":
                            answer.whole = True
                            break
                        self._count(answer, json.loads(line[6:]))
                        if (events := events + 1) >= leave_after:
                            answer.left = True
                            response.close()
                            break
        answer.took_s = time.monotonic() - began_s
        return answer

    async def _posted(
        self, session: aiohttp.ClientSession, url: str, body: dict[str, Any], headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        while True:
            try:
                return await session.post(url, json=body, headers=headers)
            except aiohttp.ClientConnectorError:
                if not self.patient:
                    raise
                await asyncio.sleep(0.2)

    @staticmethod
    def _count(answer: Answer, body: dict[str, Any]) -> None:
        if usage := body.get("usage"):
            answer.completion_tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]

    async def load(
        self, requests: int, *, at_once: int = 8, seed: int = 0, first: int = 0, most_s: float = math.inf
    ) -> None:
        """That many requests, numbered from `first` on. What does not arrive is asked for once more.

        `most_s`: after so many seconds no further ones are sent.
        """
        ends_s = time.monotonic() + most_s
        choose, numbers = random.Random(seed), iter(range(first, first + requests))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def client() -> None:
                for number in numbers:
                    for moment, begun in self.gates:
                        if number >= moment + at_once:
                            with contextlib.suppress(TimeoutError):
                                await asyncio.wait_for(begun.wait(), max(0.0, min(ends_s - time.monotonic(), 120.0)))
                    if time.monotonic() > ends_s:
                        return
                    answer = await self.ask(session, number, choose)
                    if choose.random() < 0.01 or not (answer.whole or answer.left):
                        await asyncio.sleep(0.05)
                        await self.ask(session, number, choose)

            await asyncio.gather(*(client() for _ in range(at_once)))
        self.over = True

    async def kill_at_points(self) -> list[str]:
        """Lets gateway and ledger kill themselves at each of their points, under requests. Returns the points."""
        gateway, reached, sent, self.patient = self.gateways[0], [], 0, False
        usual = gateway.arguments
        for point in kill_points.GATEWAY:
            await gateway.kill(signal.SIGTERM)
            gateway.arguments = [kill_points.__file__, "gateway", point, "3"]
            await gateway.start(may_die=True)
            assert gateway.process is not None
            while gateway.process.returncode is None:
                sent += 1
                await self.load(4, at_once=2, seed=sent, first=sent * 10_000)
            assert gateway.process.returncode == -signal.SIGKILL, point
            reached.append(point)
            gateway.arguments = usual
            await gateway.start()
        for point in kill_points.LEDGER:
            await asyncio.to_thread(self.ledger.stop)
            self.ledger.arguments = (kill_points.__file__, "ledger", point, "2")
            await asyncio.to_thread(self.ledger.start, wait=False)
            assert self.ledger.process is not None
            while self.ledger.process.poll() is None:
                sent += 1
                await self.load(4, at_once=2, seed=sent, first=sent * 10_000)
                await asyncio.sleep(0.2)
            assert self.ledger.process.returncode == -signal.SIGKILL, point
            reached.append(point)
            self.ledger.arguments = ("-m", "lorapool_ledger")
            await asyncio.to_thread(self.ledger.start)
        return reached

    async def kill_at_random(self, requests: int, kills: int, seed: int) -> Counter[str]:
        """Kills each process in turn, `kills` in all, when a number of requests was begun that is drawn at run time."""
        choose, killed = random.Random(seed), Counter[str]()
        programs = [*self.gateways, *self.runtimes]
        victims = list(range(len(programs) + 1))
        moments = sorted(choose.randrange(requests // 10, requests * 9 // 10) for _ in range(kills))
        self.gates = [(moment, asyncio.Event()) for moment in moments]
        for number, (moment, begun) in enumerate(self.gates):
            if number % len(victims) == 0:
                choose.shuffle(victims)
            while len(self.answers) < moment and not self.over:  # noqa: ASYNC110  what it waits for is in other tasks
                await asyncio.sleep(choose.uniform(0.0, 0.02))
            if self.over:
                break
            victim = victims[number % len(victims)]
            begun.set()
            if victim < len(programs):
                killed[programs[victim].name] += 1
                await programs[victim].kill_and_start()
            else:
                killed["ledger"] += 1
                await asyncio.to_thread(self.ledger.stop, signal.SIGKILL)
                await asyncio.to_thread(self.ledger.start)
        return killed


KEY = "lp-" + "k" * 43


@contextlib.asynccontextmanager
async def deployment(
    folder: Path, database_url: str, *, gateways: int = 2, runtimes: int = 2
) -> AsyncIterator[Deployment]:
    """A base with its pods and two adapters, and everything that serves and bills them."""
    tunes = folder / "pvc" / "tunes"
    world = peft_world(tunes, tiny_model("Llama", eos_token_id=257), ADAPTERS)
    for file in save_byte_tokenizer(folder / "tokenizer").iterdir():
        (world.base / file.name).write_bytes(file.read_bytes())
    kube = FakeKube()
    async with kube.running():
        config = kube.kubeconfig(folder)
        ledger = LedgerProcess(folder, database_url, config)
        await asyncio.to_thread(ledger.start)
        made = Deployment(folder, kube, ledger, [], [], [])
        try:
            for number in range(runtimes):
                made.runtimes.append(_runtime(folder, world.base, number))
            await asyncio.gather(*(program.start() for program in made.runtimes))
            digests = await _digests(made.runtimes[0])
            kube.put("basemodels", base_object(runtimeProfile="tiny", coldStart={"maxWait": "120s"}))
            for plural, raw in zip(("deployments", "replicasets"), owner_objects(), strict=True):
                kube.put(plural, raw)
            for name, digest in digests.items():
                uri = f"pvc://tunes/{name}"
                kube.put(
                    "loraadapters",
                    adapter_object(name, status=ready_status(digest, sourceUri=uri), source={"uri": uri}),
                )
            data = {
                "keySha256": hashlib.sha256(KEY.encode()).hexdigest(),
                "namespaces": "*",
                "defaultNamespace": "demo",
            }
            encoded = {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}
            metadata = {"name": "main", "namespace": "lorapool", "uid": "uid-main"}
            kube.put("secrets", {"metadata": metadata, "data": encoded})
            for number, program in enumerate(made.runtimes):
                kube.put("pods", pod_object(int(program.ready_url.split(":")[2].split("/")[0]), name=f"pod-{number}"))
            for number in range(gateways):
                program, url = _gateway(folder, config, ledger.url, number)
                made.gateways.append(program)
                made.gateway_urls.append(url)
            await asyncio.gather(*(program.start() for program in made.gateways))
            yield made
        finally:
            for program in (*made.gateways, *made.runtimes):
                await program.kill()
            ledger.stop(signal.SIGKILL)


def _environ(**given: str) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "OMP_WAIT_POLICY", "LORAPOOL_NATIVE") if name in os.environ
    }
    return {**kept, "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""), **given}


def _runtime(folder: Path, base: Path, number: int) -> Program:
    port = free_port()
    own = folder / f"runtime-{number}"
    (own / "usage").mkdir(parents=True)
    settings = {
        "model": str(base), "served_name": "tiny", "listen_host": "127.0.0.1", "listen_port": str(port),
        "cache_dir": str(own / "cache"), "kv_bytes": str(8 * 2**20), "max_rank": "16", "slots": "2", "dtype": "float32",
        "threads": "1", "pvc_root": str(folder / "pvc"), "drain_notice_s": "0.2", "drain_grace_s": "60",
        "usage_dir": str(own / "usage"), "pod_uid": f"uid-pod-{number}", "max_batch": "8",
    }  # fmt: skip
    environ = _environ(**{f"LORAPOOL_RUNTIME_{name.upper()}": value for name, value in settings.items()})
    environ["LORAPOOL_TOKEN_SHA256"] = token_sha256(runtime_token(RUNTIME_MASTER, BASE_UID))
    arguments = [str(WITNESS), str(folder / f"witness-{number}.log")]
    return Program(
        f"runtime-{number}", arguments, environ, f"http://127.0.0.1:{port}/readyz", folder / f"runtime-{number}.log"
    )


def _gateway(folder: Path, kubeconfig: Path, ledger_url: str, number: int) -> tuple[Program, str]:
    port, metrics_port = free_port(), free_port()
    settings = {
        "keys_namespace": "lorapool", "master_token_file": str(folder / "master-token"),
        "internal_ca_file": str(folder / "no-ca"), "kubeconfig": str(kubeconfig), "listen_host": "127.0.0.1",
        "api_port": str(port), "metrics_port": str(metrics_port), "shutdown_delay_s": "0", "log_format": "text",
        "ledger_url": ledger_url, "ledger_token_file": str(folder / "ledger-token"),
        "journal_dir": str(folder / f"journal-{number}"),
    }  # fmt: skip
    environ = _environ(**{f"LORAPOOL_GATEWAY_{name.upper()}": value for name, value in settings.items()})
    program = Program(
        f"gateway-{number}", ["-m", "lorapool_gateway"], environ, f"http://127.0.0.1:{metrics_port}/readyz",
        folder / f"gateway-{number}.log",
    )  # fmt: skip
    return program, f"http://127.0.0.1:{port}"


async def _digests(runtime: Program) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {runtime_token(RUNTIME_MASTER, BASE_UID)}"}
    url = runtime.ready_url.removesuffix("/readyz") + "/v1/resolve"
    digests = {}
    async with aiohttp.ClientSession(headers=headers) as session:
        for name in ADAPTERS:
            async with session.post(url, json={"source": {"uri": f"pvc://tunes/{name}"}}) as response:
                digests[name] = str((await response.json())["digest"])
    return digests
