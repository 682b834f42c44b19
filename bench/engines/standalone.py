"""A runtime process on loopback with adapters from a volume: the server for W1 over HTTP and the open loops.

It is the shipped server, started as in an operator's pod, but without a token because it listens on loopback only.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from common.places import LOGS
from engines.over_http import free_port, status_of, wait_until


class Standalone:
    """A context manager; leaving it stops the process. `settings` are the runtime's flags, without dashes."""

    def __init__(
        self,
        base: Path,
        volumes: Path,
        cache: Path,
        settings: Mapping[str, Any],
        log: str,
        *,
        python: str = sys.executable,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`python` must find the runtime's packages and their dependencies; `environ` is added to the environment."""
        self.port = free_port()
        flags = {
            "model": base,
            "served_name": "base",
            "listen_port": self.port,
            "listen_host": "127.0.0.1",
            "pvc_root": volumes,
            "cache_dir": cache,
            "drain_notice_s": 0,
            "log_level": "WARNING",
            **settings,
        }
        command = [python, "-m", "lorapool_runtime"]
        for name, value in flags.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        LOGS.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAPOOL_")}
        with (LOGS / f"{log}.log").open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env={**kept, **(environ or {})})

    def __enter__(self) -> Standalone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_ready(self, timeout_s: float = 280.0) -> None:
        wait_until(lambda: status_of(self.port, "/readyz") == 200, self.process, timeout_s)

    def register(self, claim: str, names: Sequence[str], **fields: Any) -> dict[str, str]:
        """Resolves and registers adapters; returns name -> adapter header. `fields` may request loading."""
        keys = {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        for name in names:
            source = {"uri": f"pvc://{claim}/{name}"}
            digest = _json(connection, "POST", "/v1/resolve", {"source": source})["digest"]
            body = {"display": f"bench/{name}", "source": source, **fields}
            _json(connection, "PUT", f"/v1/adapters/{name}/{digest}", body)
            keys[name] = f"{name}@{digest}"
        connection.close()
        return keys

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            return _json(connection, method, path, body)
        finally:
            connection.close()


def _json(connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    data = response.read()
    if response.status != 200:
        raise RuntimeError(f"{method} {path} answered {response.status}: {data[:300]!r}")
    return json.loads(data)
