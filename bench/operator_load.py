"""The operator with thousands of adapters: how long it needs, how long its event loop pauses, and what it writes.

    python bench/operator_load.py [--adapters 10000] [--pods 16] [--reports 2000] [--records PATH]

The operator runs as a process of its own, with leader election, kopf's watches and long-polls, against a real etcd and
kube-apiserver and the runtimes of `fleet_world.py`, all on this machine. Sources are not read: each check succeeds at
once. It is started twice: once with adapters that have no status, once as a restart; then, in a third process, 100
objects are edited. Status writes are counted in the API server's audit log, loads and moves at the runtimes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fleet_world
from common.places import BENCH, ROOT
from common.records import Record, measured, parsed, parser, report

EDITS = 100
TICK_S = 0.005
QUIET_S = 3.0
"""The operator is settled when it has written nothing for this long; the time itself does not count."""
RESYNCED = 2
"""Keys that may be due in a settled operator: the resync marks them one after the other."""
SCRAPES_S = 5.0
TIMEOUT_S = 600.0
GOALS = {
    "operator.first_settled_s": "goal: < 30",
    "operator.restart_settled_s": "goal: < 30",
    "operator.longest_pause_ms": "goal: < 250",
    "operator.memory_mib": "goal: < 200",
    "operator.first_writes_per_adapter": "goal: 1",
    "operator.writes_per_edit": "goal: 1",
    "operator.restart_status_writes": "goal: 0",
    "operator.restart_loads": "goal: 0",
    "operator.restart_moves": "goal: 0",
}


# --- the operator's process --------------------------------------------------------------


class Pauses:
    """How long other tasks keep one waiting that wants to run every few milliseconds."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.longest_cpu_s = 0.0
        """In processor time of the loop's thread: what other programs of the machine take away does not count."""

    async def watch(self) -> None:
        while True:
            began_s, began_cpu_s = time.monotonic(), time.thread_time()
            await asyncio.sleep(TICK_S)
            self.longest_s = max(self.longest_s, time.monotonic() - began_s - TICK_S)
            self.longest_cpu_s = max(self.longest_cpu_s, time.thread_time() - began_cpu_s)


class Inspector:
    """Finds every source at once."""

    async def base(self, uri: str, revision: str | None, *, credentials: Any = None) -> Any:
        from lorapool_artifacts.inspect import BaseFiles, BaseInspection

        return BaseInspection("rev", fleet_world.digest_of("base"), BaseFiles(), 1)

    async def adapter(
        self, uri: str, revision: str | None, digest: str | None, base: Any, max_rank: int, *, credentials: Any = None
    ) -> Any:
        from lorapool_operator.world.observed import SourceFacts

        return SourceFacts(fleet_world.digest_of(uri), "rev", 16, ("q_proj", "v_proj"), 1000)


async def operate(kubeconfig: Path, folder: Path, adapters: int, world: str) -> dict[str, float]:
    """Runs the operator until it is settled; with the URL of a world it then has objects edited, and settles again."""
    from lorapool_api.logs import set_up_logs
    from lorapool_artifacts.settings import SourceSettings
    from lorapool_operator.__main__ import CHATTY
    from lorapool_operator.process import Process
    from lorapool_operator.settings import Settings

    settings = Settings(
        namespaces=frozenset({fleet_world.NAMESPACE}),
        own_namespace=fleet_world.NAMESPACE,
        identity=f"operator-{os.getpid()}",
        kubeconfig=kubeconfig,
        runtime_image="runtime:1",
        profiles_file=folder / "profiles.yaml",
        master_token_file=folder / "token",
        metrics_host="127.0.0.1",
        metrics_port=0,
        lease_duration_s=60,  # API server and operator share this machine, and the API server may be slow
        lease_renew_deadline_s=40.0,
    )
    set_up_logs("operator", settings.log_level, settings.log_format, quiet=CHATTY)
    pauses, began_s = Pauses(), time.monotonic()
    watching = asyncio.create_task(pauses.watch())
    process = Process(settings, sources=SourceSettings(), inspector=Inspector())
    running = asyncio.create_task(process.run())
    scraping = asyncio.create_task(scrape(process))

    def busy() -> bool:
        control = process.control
        if not process.synced or control.queue.ready_depth() > RESYNCED or control.inspections.waiting():
            return True
        known = [item for item in control.cache.adapters if item.status.observed_generation == item.meta.generation]
        return len(known) < adapters

    async def settle() -> float:
        """Waits until no status was written for a while. Returns when the queue was empty after the last one."""
        writes, empty_s = -1, None
        while empty_s is None or time.monotonic() - empty_s < QUIET_S:
            await asyncio.sleep(0.1)
            if running.done():
                running.result()
                raise RuntimeError("the operator ended")
            written = process.cluster.writes.get("status", 0)
            if written != writes or busy():
                writes, empty_s = written, None
            elif empty_s is None:
                empty_s = time.monotonic()
        return empty_s

    async with asyncio.timeout(TIMEOUT_S):
        found = {"settled_s": await settle() - began_s, "settled_cpu_s": time.process_time()}
        if world:
            await asyncio.to_thread(asked, f"{world}/edit/{EDITS}", "POST")
            await settle()
    found |= {
        "longest_pause_ms": pauses.longest_s * 1e3,
        "longest_busy_ms": pauses.longest_cpu_s * 1e3,
        "memory_mib": memory_mib("status", "VmHWM"),
        "pss_mib": memory_mib("smaps_rollup", "Pss"),
    }
    watching.cancel()
    scraping.cancel()
    process.stop()
    await running
    return found


async def scrape(process: Any) -> None:
    """Reads the metrics, as Prometheus does, but more often."""
    while True:
        await asyncio.sleep(SCRAPES_S)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(read, f"http://127.0.0.1:{process.metrics_port}/metrics")


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        found: bytes = response.read()
        return found


def memory_mib(file: str, field: str) -> float:
    """A figure of this process's memory; VmHWM is the largest resident memory so far."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self", file).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


# --- the measurement ---------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The running API server, and the fleet's world."""

    kubeconfig: Path
    audit_log: Path
    folder: Path
    world: str


@contextmanager
def api_server(folder: Path) -> Iterator[dict[str, Any]]:
    """etcd and kube-apiserver with our CRDs, as processes of their own."""
    command, state = [sys.executable, str(ROOT / "hack" / "cluster")], str(folder / "apiserver")
    up = ["--apiserver-only", "--no-controllers", "--name", "load", "--state", state, "--while-pid", str(os.getpid())]
    done = subprocess.run([*command, "up", *up, "--json"], stdout=subprocess.PIPE, check=True)
    about: dict[str, Any] = json.loads(done.stdout)
    try:
        kubectl = [f"{about['bin_dir']}/kubectl", f"--kubeconfig={about['kubeconfig']}"]
        files = [part for path in sorted((ROOT / "crds").glob("*.yaml")) for part in ("-f", str(path))]
        subprocess.run([*kubectl, "apply", "--server-side", *files], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            [*kubectl, "wait", "--for=condition=Established", "--timeout=30s", *files],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        yield about
    finally:
        subprocess.run([*command, "down", "--state", state, "--purge"], check=True)


@contextmanager
def fleet(adapters: int, pods: int, reports: int) -> Iterator[Place]:
    """Everything around the operator."""
    with tempfile.TemporaryDirectory() as name, api_server(Path(name)) as about:
        folder = Path(name)
        (folder / "profiles.yaml").write_text("profiles:\n  default: {resources: {requests: {cpu: 100m}}}\n")
        (folder / "token").write_text(fleet_world.MASTER_TOKEN)
        where = ["--url", about["api_url"], "--token", about["token"], "--ca-file", about["ca_file"]]
        size = ["--adapters", str(adapters), "--pods", str(pods), "--reports", str(reports)]
        command = [sys.executable, str(BENCH / "fleet_world.py"), *where, *size]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as world:
            try:
                assert world.stdout is not None
                port = json.loads(world.stdout.readline())["port"]
                yield Place(Path(about["kubeconfig"]), Path(about["audit_log"]), folder, f"http://127.0.0.1:{port}")
            finally:
                world.terminate()


def asked(url: str, method: str) -> dict[str, int]:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=TIMEOUT_S) as response:
        counts: dict[str, int] = json.load(response)
        return counts


def status_writes(audit_log: Path, begin: int) -> int:
    """Status writes of adapters that the API server recorded after `begin` bytes of its log, refused ones included."""
    with audit_log.open("rb") as lines:
        lines.seek(begin)
        events = (json.loads(line) for line in lines if b'"subresource":"status"' in line and b"loraadapters" in line)
        return sum(event["verb"] == "patch" and event["stage"] == "ResponseComplete" for event in events)


def start(place: Place, adapters: int, *, edit: bool = False) -> dict[str, float]:
    """Runs one operator. Returns what it measured, and what others counted meanwhile."""
    begin = place.audit_log.stat().st_size
    asked(f"{place.world}/age", "POST")
    arguments = ["--operate", str(place.kubeconfig), str(place.folder), "--adapters", str(adapters)]
    command = [sys.executable, __file__, *arguments, "--edit", place.world if edit else ""]
    with (place.folder / "operator.log").open("w+") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT_S, env=environment())
        log.seek(0)
        if done.returncode:
            raise RuntimeError(f"the operator failed:\n{log.read()[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    counts = asked(f"{place.world}/stats", "GET")
    writes = status_writes(place.audit_log, begin)
    return found | {"writes": writes, "loads": counts.get("load", 0), "moves": counts.get("move", 0)}


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "runtime")))


def measure(adapters: int, pods: int, reports: int) -> dict[str, float]:
    """The figures of a first start, a restart and the edits, by name."""
    with fleet(adapters, pods, reports) as place:
        first, again = start(place, adapters), start(place, adapters)
        edited = start(place, adapters, edit=True)
    runs = (first, again, edited)
    return {
        "operator.first_settled_s": first["settled_s"],
        "operator.first_settled_cpu_s": first["settled_cpu_s"],
        "operator.first_writes_per_adapter": first["writes"] / adapters,
        "operator.first_longest_pause_ms": first["longest_pause_ms"],
        "operator.restart_settled_s": again["settled_s"],
        "operator.restart_settled_cpu_s": again["settled_cpu_s"],
        "operator.restart_status_writes": again["writes"],
        "operator.restart_loads": again["loads"],
        "operator.restart_moves": again["moves"],
        "operator.longest_pause_ms": max(run["longest_pause_ms"] for run in runs),
        "operator.longest_busy_ms": max(run["longest_busy_ms"] for run in runs),
        "operator.memory_mib": max(run["memory_mib"] for run in runs),
        "operator.pss_mib": max(run["pss_mib"] for run in runs),
        "operator.writes_per_edit": edited["writes"] / EDITS,
    }


UNITS = {"_s": "s", "_ms": "ms", "_mib": "MiB"}


def records_of(figures: Mapping[str, float], note: str) -> list[Record]:
    return [
        measured(
            name,
            next((u for end, u in UNITS.items() if name.endswith(end)), ""),
            [value],
            "; ".join(part for part in (GOALS.get(name), note) if part),
        )
        for name, value in figures.items()
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--adapters", type=int, default=10_000)
    made.add_argument("--pods", type=int, default=16)
    made.add_argument("--reports", type=int, default=2_000)
    made.add_argument("--operate", nargs=2, metavar=("KUBECONFIG", "FOLDER"), help=argparse.SUPPRESS)
    made.add_argument("--edit", default="", help=argparse.SUPPRESS)
    given = parsed(made)
    if given.operate:
        kubeconfig, folder = map(Path, given.operate)
        print(json.dumps(asyncio.run(operate(kubeconfig, folder, given.adapters, given.edit))))
        return
    note = f"{given.adapters} adapters, {given.pods} pods with {given.reports} reports each"
    report(records_of(measure(given.adapters, given.pods, given.reports), note), given)


if __name__ == "__main__":
    main()
