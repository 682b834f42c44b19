"""The runtime's processes in vLLM's own environment: its build for CPUs (`make vllm`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.baselines import vllm_python

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("crds", "operator", "runtime", "tests/support", "tests/support/worlds", "bench")
START_S = 900.0


def environ(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAPOOL_TEST"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in PATHS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LORAPOOL_TEST_ENGINE": "vllm",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@dataclass(frozen=True)
class VllmProcess:
    """A runtime with vLLM, the leader of a group, or one of its workers."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """(reason, message) of the lines with a reason, which is what the operator shows."""
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                one = json.loads(line)
                found.append((one["reason"], one["message"]))
        return found

    def session(self) -> set[int]:
        """All processes of its session, also those whose parent has ended."""
        found = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if int(stat.read_text().rpartition(")")[2].split()[3]) == self.process.pid:
                    found.add(int(stat.parent.name))
        return found

    def tree(self) -> set[int]:
        """It and all processes that it and they have started."""
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found


@contextlib.contextmanager
def vllm_process(folder: Path, name: str, settings: Mapping[str, Any], **env: str) -> Iterator[VllmProcess]:
    """`python -m lorapool_runtime` with these settings, until the end of the block."""
    command = [str(vllm_python()), "-m", "lorapool_runtime", "--engine", "vllm", "--log-format", "json"]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environ(**env), stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield VllmProcess(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):  # vLLM's processes are of the same group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"--- {name}\n{log.read_text()[-6000:]}")


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(pid)
    return found


def wait_until_gone(pids: set[int], seconds: float = 60.0) -> set[int]:
    """Those that still run after this time."""
    until_s = time.monotonic() + seconds
    while (left := alive(pids)) and time.monotonic() < until_s:
        time.sleep(0.1)
    return left
