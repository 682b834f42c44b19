"""A store of its own process on loopback, and what a test does with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import requests

from lorapool_api.store_protocol import StoreGrant, mint, object_path

MASTER = "s" * 64
EVERYTHING = StoreGrant(write=("",))
_LISTENING = re.compile(r"serving \S+ on (\d+), metrics on (\d+)")


@dataclass
class StoreProcess:
    """The process of `python -m lorapool_store` and its folder."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    url: str = ""
    metrics_url: str = ""
    process: subprocess.Popen[str] | None = None

    def start(self) -> StoreProcess:
        token = self.folder / "token"
        token.write_text(MASTER)
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),
            "LORAPOOL_STORE_LOCATION": f"file://{self.folder}/data",
            "LORAPOOL_STORE_MASTER_TOKEN_FILE": str(token),
            "LORAPOOL_STORE_LISTEN_HOST": "127.0.0.1",
            "LORAPOOL_STORE_API_PORT": "0",
            "LORAPOOL_STORE_METRICS_PORT": "0",
            "LORAPOOL_STORE_LOG_FORMAT": "text",
            **self.settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorapool_store"], env=environ, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := _LISTENING.search(line):
                scheme = "https" if "LORAPOOL_STORE_TLS_DIR" in self.settings else "http"
                self.url = f"{scheme}://127.0.0.1:{found[1]}"
                self.metrics_url = f"http://127.0.0.1:{found[2]}"
                return self
        self.process.stderr.close()
        raise AssertionError(f"the store ended with {self.process.wait()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it with a signal and returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(20)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    # --- what a client does

    def call(
        self, method: str, name: str, data: object = None, grant: StoreGrant | str = EVERYTHING, **headers: str
    ) -> requests.Response:
        """One request for `<namespace>/<key>`; a grant that is text is sent as the token itself."""
        token = grant if isinstance(grant, str) else mint(MASTER, grant)
        sent = {
            "Authorization": f"Bearer {token}",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        namespace, _, key = name.partition("/")
        url = self.url + object_path(namespace, key)
        return requests.request(method, url, data=data, headers=sent, timeout=20)  # type: ignore[arg-type]

    def keys(self, namespace: str, prefix: str = "") -> list[str]:
        """The keys of a listing, sorted."""
        return [item["key"] for item in self.call("GET", f"{namespace}/{prefix}").json()["objects"]]

    def files(self) -> list[str]:
        """The files on its disk, those that are being written included."""
        data = self.folder / "data"
        return sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.is_file())

    def until_files(self, count: int, timeout_s: float = 20.0) -> None:
        """Waits until so many files are on its disk. Raises TimeoutError."""
        end = time.monotonic() + timeout_s
        while len(self.files()) != count:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.files()} are not {count} files")
            time.sleep(0.01)


@contextlib.contextmanager
def running_store(folder: Path, **settings: str) -> Iterator[StoreProcess]:
    """A store in that folder; settings are names of its fields."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {f"LORAPOOL_STORE_{name.upper()}": value for name, value in settings.items()}
    store = StoreProcess(folder, given).start()
    try:
        yield store
    finally:
        if store.process is not None and store.process.poll() is None:
            store.stop()
