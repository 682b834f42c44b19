"""A closed batch over HTTP, for engines that are servers: one connection and one thread per request.

Standard library only. Responses are not streamed: the tokens that a client has at the end are compared.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

REQUEST_TIMEOUT_S = 400.0


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float = 280.0) -> None:
    """Polls a server that was just started. Raises RuntimeError when it exits or does not become ready."""
    ends_s = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        if time.monotonic() > ends_s:
            raise RuntimeError(f"the server was not ready in {timeout_s:.0f} s")
        time.sleep(0.02)


def status_of(port: int, path: str) -> int:
    """The HTTP status, or 0 when no server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


class Clients:
    """Threads that exist before the batch; each opens a new connection for it."""

    def __init__(self, port: int, count: int) -> None:
        self._pool = ThreadPoolExecutor(count)
        self._connections = [
            http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S) for _ in range(count)
        ]

    def post_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], headers: Sequence[Mapping[str, str]] | None = None
    ) -> list[Any]:
        """Sends all requests at once and returns the answers in order. Raises RuntimeError on any status but 200."""
        heads = headers or [{} for _ in bodies]
        return list(self._pool.map(self._post, self._connections, [path] * len(bodies), bodies, heads))

    @staticmethod
    def _post(
        connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> Any:
        connection.close()  # a server may have dropped it since the last batch; connecting on loopback costs nothing
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {data[:300]!r}")
        return json.loads(data)
