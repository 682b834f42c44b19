"""The running demo for the cluster tests: kubectl, an OpenAI client, a prober, and fault injection.

Made once per test run by `e2e/conftest.py` from the demo's summary.json.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from openai import APIStatusError, AsyncOpenAI, OpenAI

ROOT = Path(__file__).resolve().parents[3]
BASE = "smollm2"
RUNTIMES = "lorapool.dev/base,!lorapool.dev/trainer"
"""Label selector of runtimes' pods: trainers have the label of their base too."""


@dataclass
class World:
    summary: dict[str, Any]
    name: str
    starts_unix_s: list[float] = field(default_factory=list)
    """When a test started a component of the control plane again."""

    @property
    def namespace(self) -> str:
        return str(self.summary["namespace"])

    @property
    def keys_namespace(self) -> str:
        return f"{self.namespace}-keys"

    @property
    def gateway(self) -> str:
        return str(self.summary["gateway_url"])

    @property
    def tasks(self) -> list[str]:
        return [answer["task"] for answer in self.summary["answers"]]

    def model(self, task: str) -> str:
        return f"{self.namespace}/{task}"

    def question(self, task: str) -> dict[str, Any]:
        """Arguments of a chat call whose greedy answer is known: `answer(task)`."""
        for item in json.loads((ROOT / "examples" / "finetunes" / "demo.json").read_text()):
            if item["task"] == task:
                return {
                    "model": self.model(task),
                    "messages": item["messages"],
                    "max_tokens": item.get("max_tokens", 64),
                    "temperature": 0,
                }
        raise KeyError(task)

    def answer(self, task: str) -> str:
        return str(next(a["answer"] for a in self.summary["answers"] if a["task"] == task))

    def header(self, task: str) -> str:
        return str(next(a["header"] for a in self.summary["answers"] if a["task"] == task))

    # --- the cluster -----------------------------------------------------------------------

    def kubectl(self, *argv: str, stdin: str | None = None, check: bool = True, timeout_s: float = 120) -> str:
        command = [self.summary["kubectl"], "--kubeconfig", self.summary["kubeconfig"], "-n", self.namespace, *argv]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(argv)}: {done.stderr or done.stdout}")
        return done.stdout if not done.returncode else done.stderr

    def helm(self, *argv: str, timeout_s: float = 300) -> str:
        command = [self.summary["helm"], "--kubeconfig", self.summary["kubeconfig"], "-n", self.namespace, *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode:
            raise AssertionError(f"helm {' '.join(argv)}: {done.stderr or done.stdout}")
        return done.stdout

    def get(self, *argv: str) -> Any:
        return json.loads(self.kubectl("get", *argv, "-o", "json"))

    def apply(self, *manifests: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(listed))

    def patch(self, kind: str, name: str, spec: dict[str, Any]) -> None:
        self.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def condition(self, kind: str, name: str, condition: str) -> tuple[str, str]:
        """(status, reason) of a condition, ("", "") when it is not there yet."""
        for item in self.get(kind, name).get("status", {}).get("conditions", []):
            if item["type"] == condition:
                return item["status"], item["reason"]
        return "", ""

    def runtime_pods(self) -> list[dict[str, Any]]:
        """Runtimes' pods that exist, whatever their state; the demo has one base."""
        return list(self.get("pods", "-l", RUNTIMES)["items"])

    def wait(self, what: str, check: Callable[[], object], *, timeout_s: float, every_s: float = 0.5) -> None:
        """Waits until `check` is true; fails with the last value and the current objects."""
        deadline = time.monotonic() + timeout_s
        last: object = None
        while time.monotonic() < deadline:
            last = check()
            if last is True or (last and not isinstance(last, str | tuple)):
                return
            time.sleep(every_s)
        raise AssertionError(
            f"{what}: not within {timeout_s} s; last seen {last!r}\n{self.kubectl('get', 'bm,lora,pods')}"
        )

    def cluster(self, verb: str, component: str) -> None:
        """Stops or starts a component of the local cluster, as a failure would."""
        if verb == "start":
            self.starts_unix_s.append(time.time())
        command = [sys.executable, str(ROOT / "hack" / "cluster"), verb, "--name", self.summary["cluster"], component]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr

    # --- clients ---------------------------------------------------------------------------

    def client(self, **changed: Any) -> OpenAI:
        given = {"base_url": f"{self.gateway}/v1", "api_key": self.summary["api_key"], "timeout": 300, "max_retries": 0}
        return OpenAI(**{**given, **changed})

    def async_client(self, **changed: Any) -> AsyncOpenAI:
        given = {"base_url": f"{self.gateway}/v1", "api_key": self.summary["api_key"], "timeout": 300, "max_retries": 0}
        return AsyncOpenAI(**{**given, **changed})

    def chat(self, task: str) -> tuple[str, str]:
        """(answer, identity header) of the task's known question."""
        with self.client() as client:
            raw = client.chat.completions.with_raw_response.create(**self.question(task))
            reply = raw.parse()
        return (reply.choices[0].message.content or "").strip(), raw.headers["x-lorapool-adapter"]

    def scrape(self, component: str) -> list[str]:
        """The /metrics text of each pod of a component, read through the API server's proxy."""
        selector = RUNTIMES if component == "runtime" else f"app.kubernetes.io/component={component}"
        path = f"/api/v1/namespaces/{self.namespace}/pods/{{}}:9090/proxy/metrics"
        pods = [pod["metadata"]["name"] for pod in self.get("pods", "-l", selector)["items"]]
        return [self.kubectl("get", "--raw", path.format(pod)) for pod in pods]

    def prometheus(self, expression: str) -> list[dict[str, Any]]:
        """Instant query; the series it returns."""
        reply = httpx.get(
            f"{self.summary['prometheus_url'].rstrip('/')}/api/v1/query", params={"query": expression}, timeout=30
        )
        reply.raise_for_status()
        return list(reply.json()["data"]["result"])


@dataclass
class Prober:
    """Asks known questions without pause until stopped, and keeps every outcome."""

    world: World
    tasks: list[str]
    pause_s: float = 0.3
    asked: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    """Answers or identities that differ from the requested adapter's; must always be empty."""
    lost: list[str] = field(default_factory=list)
    """Neither an answer nor an OpenAI-shaped 429 or 503 with Retry-After."""
    deferred: list[str] = field(default_factory=list)
    """429 or 503 with Retry-After."""
    slowest_s: float = 0.0
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        async with self.world.async_client() as client:
            while not self._stop.is_set():
                for task in self.tasks:
                    await self.ask(client, task)
                    try:
                        await asyncio.wait_for(self._stop.wait(), self.pause_s)
                        return
                    except TimeoutError:
                        continue

    async def ask(self, client: AsyncOpenAI, task: str) -> None:
        self.asked += 1
        started = time.monotonic()
        try:
            raw = await client.chat.completions.with_raw_response.create(**self.world.question(task))
            reply = raw.parse()
        except APIStatusError as error:
            if error.status_code in (429, 503) and "retry-after" in error.response.headers:
                self.deferred.append(f"{task}: {error.status_code} {error.message}")
            else:
                self.lost.append(f"{task}: {error.status_code} {error.message}")
            return
        except Exception as error:
            self.lost.append(f"{task}: {type(error).__name__} {error}")
            return
        finally:
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        text = (reply.choices[0].message.content or "").strip()
        header = raw.headers.get("x-lorapool-adapter", "")
        if header != self.world.header(task) or text != self.world.answer(task):
            self.wrong.append(f"{task}: {header}: {text[:80]!r}")
        else:
            self.right += 1

    def stop(self) -> None:
        self._stop.set()


def copies_of_routing(
    world: World, names: Iterable[str], *, labels: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """LoraAdapters with these names and labels, and the source of the routing fine-tune."""
    source = world.get("lora", "routing")["spec"]["source"]
    return [
        {
            "apiVersion": "lorapool.dev/v1alpha1",
            "kind": "LoraAdapter",
            "metadata": {"name": name, "namespace": world.namespace, "labels": dict(labels or {})},
            "spec": {"baseModelRef": {"name": BASE}, "source": source},
        }
        for name in names
    ]


@contextmanager
def upgraded(world: World, *changed: str, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """The release with changed values, as words for `--set` and as a file; afterwards as it was before."""
    before = json.loads(world.helm("status", "lorapool", "-o", "json"))["version"]
    try:
        upgrade(world, *changed, values=values)
        yield
    finally:
        world.helm("rollback", "lorapool", str(before), "--wait", "--timeout", "5m", timeout_s=400)


def upgrade(world: World, *changed: str, values: Mapping[str, Any] | None = None) -> None:
    chart = str(ROOT / "charts" / "lorapool")
    words = [word for value in changed for word in ("--set", value)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values or {}, file)
        file.flush()
        words += ["--values", file.name, "--wait", "--timeout", "5m"]
        world.helm("upgrade", "lorapool", chart, "--reset-then-reuse-values", *words, timeout_s=400)
