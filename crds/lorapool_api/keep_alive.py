"""Socket options with which the kernel ends connections to machines that are lost, and so send no reset."""

from __future__ import annotations

import contextlib
import socket
from typing import Final, Protocol

DEAD_PEER_S: Final = 10.0
"""Between gateway and runtime, a peer that has acknowledged nothing for this long, neither data nor probes, is lost."""
_PROBES: Final = 3


class Connection(Protocol):
    """What a socket and the socket of an asyncio transport have in common."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def keep_alive(connection: Connection, dead_peer_s: float = DEAD_PEER_S) -> None:
    """Sets keep-alive and TCP_USER_TIMEOUT, as far as the platform has them.

    A peer that acknowledges but takes no more data for `dead_peer_s` is given up too.
    """
    probe_s = max(1, int(dead_peer_s) // _PROBES)
    options = {
        "TCP_KEEPIDLE": probe_s,
        "TCP_KEEPINTVL": probe_s,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": int(dead_peer_s * 1000),
    }
    with contextlib.suppress(OSError):  # it is closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if (option := getattr(socket, name, None)) is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
