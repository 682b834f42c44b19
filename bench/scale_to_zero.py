"""W6, scale to zero: sends a request to a base without a pod and measures the platform's own part of the wait.

    python bench/scale_to_zero.py [--rounds 3] [--demo .demo] [--records PATH]

It uses the cluster that `make demo` keeps running, found by its summary.json; without one the records are "not run".
`kubectl` watches the base's pods. The platform's own part is the time until the pod exists and the time after it is
ready; between them are the pod's start and the model's load. Before each round a short idle time scales the base to
zero; the original value is restored at the end.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from common.places import ROOT
from common.records import COUNTED_ROUNDS, Record, measured, not_run, parsed, parser, report

BASE = "smollm2"
SERVED_NAME = "smollm2-135m-instruct"
POD_LABEL = f"lorapool.dev/base={BASE}"
SLEEP_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 300.0
NO_CLUSTER = "no demo cluster is up: `make demo` starts one"
RECORDS = {
    "w6.answer_s": "s",
    "w6.pod_start_s": "s",
    "w6.model_load_s": "s",
    "w6.wake_ms": "ms",
    "w6.after_ready_ms": "ms",
    "w6.own_ms": "ms",
}


# --- observations and what follows from them (pure) ----------------------------------------


@dataclass
class Seen:
    """When the watch first reported each state, in seconds of one clock; None: not yet."""

    created_s: float | None = None
    running_s: float | None = None
    ready_s: float | None = None

    def note(self, pod: Mapping[str, Any], at_s: float) -> None:
        """Records one state of the base's one pod; states of a terminating pod are ignored."""
        if pod["metadata"].get("deletionTimestamp"):
            return
        status = pod.get("status", {})
        containers = status.get("containerStatuses", [])
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", []))
        running = ready or (bool(containers) and all("running" in one.get("state", {}) for one in containers))
        self.created_s = self.created_s or at_s
        self.running_s = self.running_s or (at_s if running else None)
        self.ready_s = self.ready_s or (at_s if ready else None)


@dataclass(frozen=True)
class Wait:
    """One round in seconds, from the request to its first token."""

    answer: float
    wake: float
    """Until the pod existed: the gateway, the scale request, the operator's Deployment, the controllers."""
    pod_start: float
    model_load: float
    """From the running container to the pod's readiness: imports, weights, the probe's period."""
    after_ready: float
    """Until the first token; negative if the gateway knew before the watch reported it."""

    @property
    def own(self) -> float:
        return self.wake + max(0.0, self.after_ready)


def wait_of(asked_s: float, seen: Seen, first_token_s: float) -> Wait:
    """Splits one round's wait into its parts. Raises ValueError when the watch did not report all of them."""
    if seen.created_s is None or seen.running_s is None or seen.ready_s is None:
        raise ValueError(f"the pod was not seen to start: {seen}")
    return Wait(
        answer=first_token_s - asked_s,
        wake=seen.created_s - asked_s,
        pod_start=seen.running_s - seen.created_s,
        model_load=seen.ready_s - seen.running_s,
        after_ready=first_token_s - seen.ready_s,
    )


def records_of(waits: list[Wait]) -> list[Record]:
    runs = {
        "w6.answer_s": [wait.answer for wait in waits],
        "w6.pod_start_s": [wait.pod_start for wait in waits],
        "w6.model_load_s": [wait.model_load for wait in waits],
        "w6.wake_ms": [wait.wake * 1e3 for wait in waits],
        "w6.after_ready_ms": [wait.after_ready * 1e3 for wait in waits],
        "w6.own_ms": [wait.own * 1e3 for wait in waits],
    }
    share = statistics.median(wait.own / wait.answer for wait in waits)
    notes = {
        "w6.answer_s": "from no pod to the first token, on the demo's cluster",
        "w6.own_ms": f"{share:.1%} of the wait: until the pod exists, and after it is ready",
    }
    return [measured(name, unit, runs[name], notes.get(name, "")) for name, unit in RECORDS.items()]


def missing(why: str) -> list[Record]:
    return [not_run(name, unit, why) for name, unit in RECORDS.items()]


class JsonStream:
    """Splits a stream of concatenated JSON documents, whatever the chunk boundaries."""

    def __init__(self) -> None:
        self._text = ""
        self._decoder = json.JSONDecoder()

    def feed(self, text: str) -> Iterator[Any]:
        self._text = (self._text + text).lstrip()
        while self._text:
            try:
                document, end = self._decoder.raw_decode(self._text)
            except json.JSONDecodeError:
                return  # the document is not complete yet
            self._text = self._text[end:].lstrip()
            yield document


# --- the cluster ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    kubectl: tuple[str, ...]
    gateway_url: str
    api_key: str = field(repr=False)

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Cluster:
        base = (summary["kubectl"], "--kubeconfig", summary["kubeconfig"], "-n", summary["namespace"])
        return cls(tuple(str(part) for part in base), summary["gateway_url"], summary["api_key"])

    def run(self, *arguments: str) -> str:
        done = subprocess.run([*self.kubectl, *arguments], capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise SystemExit(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def up(self) -> bool:
        try:
            done = subprocess.run([*self.kubectl, "get", "bm", BASE], capture_output=True, timeout=15, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def idle_after(self, value: str | None = None) -> str:
        """Returns the base's idle time; sets it first if a value is given, and then returns the previous one."""
        before = json.loads(self.run("get", "bm", BASE, "-o", "json"))["spec"]["scaling"]["idleAfter"]
        if value is not None:
            patch = json.dumps({"spec": {"scaling": {"idleAfter": value}}})
            self.run("patch", "bm", BASE, "--type=merge", "-p", patch)
        return str(before)

    def wait_until_asleep(self) -> None:
        ends_s = time.monotonic() + SLEEP_TIMEOUT_S
        while time.monotonic() < ends_s:
            if not json.loads(self.run("get", "pods", "-l", POD_LABEL, "-o", "json"))["items"]:
                return
            time.sleep(1)
        raise SystemExit(f"{BASE} still has a pod after {SLEEP_TIMEOUT_S:.0f} s without a request")

    def first_token_s(self) -> float:
        """Sends a request to the base and returns the time of the stream's first event (`time.perf_counter`)."""
        url = urlsplit(self.gateway_url)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=ANSWER_TIMEOUT_S)
        body = {"model": SERVED_NAME, "prompt": "Once upon a time", "max_tokens": 2, "temperature": 0, "stream": True}
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"the gateway answered {response.status}: {response.read(300)!r}")
            for line in response:
                if line.startswith(b"data: "):
                    return time.perf_counter()
        finally:
            connection.close()
        raise SystemExit("the stream ended without a token")


class Watch:
    """`kubectl get pods --watch` in a thread; a context manager. `seen` has the reported states with their times."""

    def __init__(self, cluster: Cluster) -> None:
        command = [*cluster.kubectl, "get", "pods", "-l", POD_LABEL, "--watch", "-o", "json"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._thread = threading.Thread(target=self._read, name="watch pods")
        self.seen = Seen()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._thread.join()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        stream = JsonStream()
        for line in self._process.stdout:
            for document in stream.feed(line):
                for pod in document["items"] if document["kind"] == "List" else [document]:
                    self.seen.note(pod, time.perf_counter())


def one_round(cluster: Cluster, idle_after: str) -> Wait:
    cluster.idle_after("1s")
    cluster.wait_until_asleep()
    cluster.idle_after(idle_after)  # or the base would be scaled to zero before the round's end is reported
    with Watch(cluster) as watch:
        time.sleep(2)  # the watch is established
        asked_s = time.perf_counter()
        first_s = cluster.first_token_s()
        time.sleep(2)  # readiness may be reported after the answer
    return wait_of(asked_s, watch.seen, first_s)


def measure(summary: Path, rounds: int) -> list[Record]:
    if not summary.is_file():
        return missing(NO_CLUSTER)
    cluster = Cluster.of(json.loads(summary.read_text()))
    if not cluster.up():
        return missing(NO_CLUSTER)
    before = cluster.idle_after()
    try:
        waits = []
        for number in range(rounds):
            waits.append(one_round(cluster, before))
            print(f"  round {number + 1}: {waits[-1]}", file=sys.stderr, flush=True)
    finally:
        cluster.idle_after(before)
    return records_of(waits)


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=COUNTED_ROUNDS)
    asked.add_argument("--demo", type=Path, default=ROOT / ".demo", help="the demo's folder")
    given = parsed(asked)
    records = measure(given.demo / "summary.json", given.rounds)
    report(records, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
