"""The operator with thousands of adapters: how long it needs, how long its event loop pauses, and what it writes.

    python bench/operator_load.py [--adapters 10000] [--pods 16] [--reports 2000] [--records PATH]

The operator runs as a process of its own, with leader election, kopf's watches and long-polls, against the API server
and the runtimes of `fleet_world.py`. Sources are not read: each check succeeds at once. It is started twice: once with
adapters that have no status, once as a restart; then 100 objects are edited.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import fleet_world
from places import BENCH, ROOT
from records import Record, measured, parsed, parser, report

EDITS = 100
TICK_S = 0.005
QUIET_S = 3.0
"""The operator is settled when it has written nothing for this long; the time itself does not count."""
RESYNCED = 2
"""Keys that may be due in a settled operator: the resync marks them one after the other."""
STATUS = "status loraadapters"
TIMEOUT_S = 600.0


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

    async def base(self, uri: str, revision: str | None) -> Any:
        from lorapool_artifacts.compatibility import BaseFacts
        from lorapool_artifacts.inspect import BaseInspection

        return BaseInspection("rev", fleet_world.digest_of("base"), BaseFacts({}), 1)

    async def adapter(self, uri: str, revision: str | None, digest: str | None, base: Any, max_rank: int) -> Any:
        from lorapool_operator.world.observed import SourceFacts

        return SourceFacts(fleet_world.digest_of(uri), "rev", 16, ("q_proj", "v_proj"), 1000)


async def operate(url: str, folder: Path, adapters: int, *, edit: bool) -> dict[str, float]:
    from lorapool_artifacts.settings import SourceSettings
    from lorapool_operator.process import Process
    from lorapool_operator.settings import Settings

    settings = Settings(
        namespaces=frozenset({fleet_world.NAMESPACE}),
        own_namespace=fleet_world.NAMESPACE,
        identity=f"operator-{os.getpid()}",
        kubeconfig=folder / "kubeconfig",
        runtime_image="runtime:1",
        profiles_file=folder / "profiles.yaml",
        master_token_file=folder / "token",
        metrics_host="127.0.0.1",
        metrics_port=0,
    )
    pauses, began_s = Pauses(), time.monotonic()
    watching = asyncio.create_task(pauses.watch())
    process = Process(settings, sources=SourceSettings(), inspector=Inspector())
    running = asyncio.create_task(process.run())
    async with aiohttp.ClientSession(url) as session:

        async def settle() -> float:
            """Waits until no status was written for a while. Returns when the queue was empty after the last one."""
            writes, empty_s = -1, None
            while empty_s is None or time.monotonic() - empty_s < QUIET_S:
                if running.done():
                    running.result()
                    raise RuntimeError("the operator ended")
                now = await stats(session)
                busy = process.control.queue.ready_depth() > RESYNCED or process.control.inspections.waiting()
                if busy or not process.synced or now["known"] < adapters or now["counts"].get(STATUS, 0) != writes:
                    empty_s = None
                elif empty_s is None:
                    empty_s = time.monotonic()
                writes = now["counts"].get(STATUS, 0)
                await asyncio.sleep(0.1)
            return empty_s

        async with asyncio.timeout(TIMEOUT_S):
            found = {"settled_s": await settle() - began_s}
            if edit:
                await session.post("/age")
                await session.post(f"/edit/{EDITS}")
                await settle()
    found |= {
        "longest_pause_ms": pauses.longest_s * 1e3,
        "longest_busy_ms": pauses.longest_cpu_s * 1e3,
        "cpu_s": time.process_time(),
        "memory_mib": peak_mib(),
    }
    watching.cancel()
    process.stop()
    await running
    return found


async def stats(session: aiohttp.ClientSession) -> Any:
    async with session.get("/stats") as response:
        return await response.json()


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


# --- the measurement ---------------------------------------------------------------------


def prepare(folder: Path, url: str) -> None:
    (folder / "profiles.yaml").write_text("profiles:\n  default: {resources: {requests: {cpu: 100m}}}\n")
    (folder / "token").write_text("m" * 64)
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "none"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "kubeconfig").write_text(json.dumps(kubeconfig))


def start(url: str, folder: Path, adapters: int, *, edit: bool) -> tuple[dict[str, float], dict[str, int]]:
    """Runs one operator. Returns what it measured, and what the world counted meanwhile."""
    asyncio.run(post(url, "/age"))
    arguments = ["--operate", url, str(folder), "--adapters", str(adapters), *(["--edit"] if edit else [])]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S, env=environment()
    )
    return json.loads(done.stdout.splitlines()[-1]), asyncio.run(counted(url))


async def post(url: str, path: str) -> None:
    async with aiohttp.ClientSession(url) as session, session.post(path):
        pass


async def counted(url: str) -> dict[str, int]:
    async with aiohttp.ClientSession(url) as session:
        counts: dict[str, int] = (await stats(session))["counts"]
        return counts


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "runtime")))


def measure(adapters: int, pods: int, reports: int) -> dict[str, float]:
    """The figures of a first start, a restart and the edits, by name."""
    size = ["--adapters", str(adapters), "--pods", str(pods), "--reports", str(reports)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([sys.executable, str(BENCH / "fleet_world.py"), *size], stdout=subprocess.PIPE) as world,
    ):
        try:
            assert world.stdout is not None
            url = f"http://127.0.0.1:{json.loads(world.stdout.readline())['port']}"
            prepare(Path(folder), url)
            first, made = start(url, Path(folder), adapters, edit=False)
            again, unchanged = start(url, Path(folder), adapters, edit=False)
            edited, changes = start(url, Path(folder), adapters, edit=True)
        finally:
            world.terminate()
    runs = (first, again, edited)
    return {
        "operator.first_settled_s": first["settled_s"],
        "operator.first_status_writes": made.get(STATUS, 0),
        "operator.restart_settled_s": again["settled_s"],
        "operator.restart_status_writes": unchanged.get(STATUS, 0),
        "operator.restart_loads": unchanged.get("runtime load", 0),
        "operator.restart_moves": unchanged.get("runtime delete", 0),
        "operator.longest_pause_ms": max(run["longest_pause_ms"] for run in runs),
        "operator.longest_busy_ms": max(run["longest_busy_ms"] for run in runs),
        "operator.memory_mib": max(run["memory_mib"] for run in runs),
        "operator.writes_per_edit": changes.get(STATUS, 0) / EDITS,
    }


UNITS = {"_s": "s", "_ms": "ms", "_mib": "MiB"}


def records_of(figures: Mapping[str, float], note: str) -> list[Record]:
    return [
        measured(name, next((u for end, u in UNITS.items() if name.endswith(end)), ""), [value], note)
        for name, value in figures.items()
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--adapters", type=int, default=10_000)
    made.add_argument("--pods", type=int, default=16)
    made.add_argument("--reports", type=int, default=2_000)
    made.add_argument("--operate", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    made.add_argument("--edit", action="store_true", help=argparse.SUPPRESS)
    given = parsed(made)
    if given.operate:
        url, folder = given.operate
        print(json.dumps(asyncio.run(operate(url, Path(folder), given.adapters, edit=given.edit))))
        return
    note = f"{given.adapters} adapters, {given.pods} pods with {given.reports} reports each; the API server is a fake"
    report(records_of(measure(given.adapters, given.pods, given.reports), note), given)


if __name__ == "__main__":
    main()
