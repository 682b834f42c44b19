"""A runtime process on loopback with adapters from a volume: the server for W1 over HTTP and the open loops.

It is the shipped server, started as in an operator's pod, but without a token because it listens on loopback only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.places import LOGS
from engines.over_http import free_port, status_of, wait_until


class ServerProcess:
    """A server and all processes that it starts, as a context manager: leaving it ends them."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: str) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        with (LOGS / f"{log}.log").open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env={**environ}, start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self._signal(signal.SIGKILL)  # and its remaining children
        self.process.wait()

    def pause(self) -> None:
        """Stops all its processes, whose threads may spin while they wait and take the cores of another server."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """Processor time of all its processes so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError, ValueError):  # it has ended meanwhile
                fields = stat.read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12]) if int(fields[3]) == self.process.pid else 0  # its session
        return ticks / os.sysconf("SC_CLK_TCK")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, number)


class Standalone(ServerProcess):
    """The shipped runtime. `settings` are its flags, without dashes."""

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
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAPOOL_")}
        super().__init__(command, {**kept, **(environ or {})}, log)

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
