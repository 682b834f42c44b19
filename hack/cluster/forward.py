"""Carries TCP connections from a listening socket to an address, byte for byte.

This makes a cluster reachable without a change of the host's network: the listening socket was made in the host's
network namespace, the connection is made in the cluster's. No address, route or iptables rule of the host is involved.
"""

import asyncio
import contextlib
import socket

_CHUNK_BYTES = 256 * 1024
_CONNECT_TIMEOUT_S = 10.0


class Forward:
    """One listening socket and its target (`host:port`; the host may be the name of a Service in the cluster)."""

    def __init__(self, listener: socket.socket, target: str) -> None:
        self.port = listener.getsockname()[1]
        self.target = target
        self._listener = listener
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, sock=self._listener, limit=_CHUNK_BYTES)

    def close(self) -> None:
        if self._server:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=_CHUNK_BYTES)
        except (OSError, TimeoutError):
            writer.transport.abort()  # the client sees a reset, as from a port where nothing listens
            return
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        finally:
            for side in (writer, far_writer):
                side.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copies one direction; passes on a half-close, and resets one side when the other breaks."""
    try:
        while data := await source.read(_CHUNK_BYTES):
            sink.write(data)
            await sink.drain()
        with contextlib.suppress(OSError):
            sink.write_eof()
    except OSError:
        sink.transport.abort()


def listen(port: int) -> socket.socket:
    """A listening socket on the host's loopback; OSError when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(512)
    except OSError:
        listener.close()
        raise
    return listener
