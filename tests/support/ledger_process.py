"""The ledger as a process, `python -m lorapool_ledger`, that a test can kill and start again on the same ports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

TOKEN = "l" * 64
RUNTIME_MASTER = "m" * 64
_SERVING = re.compile(r"serving the ledger on (\d+), metrics on (\d+)")
_START_TIMEOUT_S = 120.0


@dataclass
class LedgerProcess:
    """Its folder has tokens and log; `database_url` and `kubeconfig` are given."""

    folder: Path
    database_url: str
    kubeconfig: Path
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    metrics_port: int = 0
    arguments: tuple[str, ...] = ("-m", "lorapool_ledger")
    """Of the interpreter."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "ledger.log").read_text()

    def start(self, *, wait: bool = True) -> LedgerProcess:
        """Starts it, on the ports that it had before. `wait`: until it serves."""
        (self.folder / "ledger-token").write_text(TOKEN)
        (self.folder / "master-token").write_text(RUNTIME_MASTER)
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),
            "LORAPOOL_LEDGER_DATABASE_URL": self.database_url,
            "LORAPOOL_LEDGER_KEYS_NAMESPACE": "lorapool",
            "LORAPOOL_LEDGER_TOKEN_FILE": str(self.folder / "ledger-token"),
            "LORAPOOL_LEDGER_MASTER_TOKEN_FILE": str(self.folder / "master-token"),
            "LORAPOOL_LEDGER_INTERNAL_CA_FILE": str(self.folder / "no-ca"),
            "LORAPOOL_LEDGER_KUBECONFIG": str(self.kubeconfig),
            "LORAPOOL_LEDGER_LISTEN_HOST": "127.0.0.1",
            "LORAPOOL_LEDGER_API_PORT": str(self.port),
            "LORAPOOL_LEDGER_METRICS_PORT": str(self.metrics_port),
            "LORAPOOL_LEDGER_LOG_FORMAT": "text",
            **self.settings,
        }
        before = (self.folder / "ledger.log").stat().st_size if (self.folder / "ledger.log").exists() else 0
        with (self.folder / "ledger.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments], env=environ, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + _START_TIMEOUT_S
        while wait:
            with (self.folder / "ledger.log").open("rb") as log:
                log.seek(before)
                text = log.read().decode()
            if found := _SERVING.search(text):
                self.port, self.metrics_port = int(found[1]), int(found[2])
                break
            assert self.process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.02)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it with a signal and returns its exit code; a negative one is a signal's."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def status(self, path: str) -> int:
        """HTTP status of a path of the metrics port."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    def metric(self, name: str) -> float:
        """The value of one series; 0 if there is none."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=20) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[-1])
        return 0.0
