"""The protocol between the command line and a running supervisor: a Unix socket, one JSON object in each direction.

A listening TCP socket may be sent with the request: this is how a port of the host's 127.0.0.1 is served from inside
the cluster's network namespace.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import NotRunningError

SOCKET = "control.sock"
_LIMIT_BYTES = 64 * 1024
_TIMEOUT_S = 20.0

Handler = Callable[[dict[str, Any], list[int]], dict[str, Any]]


def serve(state: Path, handle: Handler) -> None:
    """Answers requests in a daemon thread until the process ends."""
    os.chdir(state)  # bound by a relative name: a state folder's path may be longer than a socket's name may be
    with contextlib.suppress(FileNotFoundError):
        os.unlink(SOCKET)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(SOCKET)
    os.chmod(SOCKET, 0o600)
    listener.listen(8)
    threading.Thread(target=_accept, args=(listener, handle), name="control", daemon=True).start()


def _accept(listener: socket.socket, handle: Handler) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_TIMEOUT_S)
            try:
                data, descriptors, _, _ = socket.recv_fds(connection, _LIMIT_BYTES, 1)
                answer = handle(json.loads(data), descriptors)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode())


def ask(state: Path, request: dict[str, Any], listener: socket.socket | None = None) -> dict[str, Any]:
    """Sends one request to the cluster of this state folder. Raises NotRunningError."""
    try:
        folder = os.open(state, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        raise NotRunningError(f"there is no cluster in {state}", remedy="`python3 hack/cluster up`") from None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(f"/proc/self/fd/{folder}/{SOCKET}")
            descriptors = [listener.fileno()] if listener else []
            socket.send_fds(connection, [json.dumps(request).encode()], descriptors)
            answer = b""
            while chunk := connection.recv(_LIMIT_BYTES):
                answer += chunk
    except OSError as error:
        raise NotRunningError(f"the cluster in {state} does not answer: {error}", remedy="`up` it again") from None
    finally:
        os.close(folder)
    result: dict[str, Any] = json.loads(answer)
    return result
