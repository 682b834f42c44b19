"""The runtime as a process, `python -m lorapool_runtime`, for tests over a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapool_api.protocol import token_sha256

TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class RuntimeProcess:
    url: str
    popen: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def runtime_process(
    folder: Path, base: Path, *, program: Sequence[str] = ("-m", "lorapool_runtime"), **settings: Any
) -> Iterator[RuntimeProcess]:
    """Runs the process until the end of the block; it is ready at its start. `settings`: fields of RuntimeSettings."""
    port = free_port()
    values = {
        "model": str(base), "served_name": "tiny", "listen_host": "127.0.0.1", "listen_port": port,
        "cache_dir": str(folder / "cache"), "kv_bytes": 8 * 2**20, "max_rank": 16, "slots": 2,
        "drain_notice_s": 0.2, "dtype": "float32", "threads": os.environ.get("LORAPOOL_TEST_THREADS", "1"),
    } | settings  # fmt: skip
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LORAPOOL_") or name == "LORAPOOL_NATIVE"
    }
    environ |= {f"LORAPOOL_RUNTIME_{name.upper()}": str(value) for name, value in values.items()}
    environ["LORAPOOL_TOKEN_SHA256"] = token_sha256(TOKEN)
    with (folder / "log").open("wb") as log:
        popen = subprocess.Popen([sys.executable, *program], env=environ, stdout=log, stderr=log)
    try:
        process = RuntimeProcess(f"http://127.0.0.1:{port}", popen, folder / "log")
        _wait_until_ready(process)
        yield process
    finally:
        popen.kill()
        popen.wait()


def _wait_until_ready(process: RuntimeProcess) -> None:
    deadline = time.monotonic() + 600  # seconds; minutes only on a machine with other work
    while True:
        assert process.popen.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline, process.log.read_text()
        try:
            with urllib.request.urlopen(process.url + "/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
