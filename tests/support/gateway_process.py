"""The gateway as a process, `python -m lorapool_gateway`, that a test can kill and start again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import Process
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

_LISTENING = re.compile(r"listening on (\d+), metrics on (\d+)")
_START_TIMEOUT_S = 120.0


@dataclass
class GatewayProcess:
    """Its folder has its log and its journal; it is ready once it has read all objects."""

    folder: Path
    kubeconfig: Path
    master_token: str
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    metrics_port: int = 0
    process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> GatewayProcess:
        """Starts it on free ports, or on those that it had before."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "master-token").write_text(self.master_token)
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),
            "LORAPOOL_GATEWAY_KEYS_NAMESPACE": "lorapool",
            "LORAPOOL_GATEWAY_MASTER_TOKEN_FILE": str(self.folder / "master-token"),
            "LORAPOOL_GATEWAY_INTERNAL_CA_FILE": str(self.folder / "no-ca"),
            "LORAPOOL_GATEWAY_KUBECONFIG": str(self.kubeconfig),
            "LORAPOOL_GATEWAY_LISTEN_HOST": "127.0.0.1",
            "LORAPOOL_GATEWAY_API_PORT": str(self.port),
            "LORAPOOL_GATEWAY_METRICS_PORT": str(self.metrics_port),
            "LORAPOOL_GATEWAY_SHUTDOWN_DELAY_S": "0",
            "LORAPOOL_GATEWAY_LOG_FORMAT": "text",
            "LORAPOOL_GATEWAY_JOURNAL_DIR": str(self.folder / "journal"),
            **self.settings,
        }
        path = self.folder / "gateway.log"
        before = path.stat().st_size if path.exists() else 0
        with path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lorapool_gateway", env=environ, stdout=log, stderr=asyncio.subprocess.STDOUT
            )
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not (found := _LISTENING.search(path.read_bytes()[before:].decode())):
                assert self.process.returncode is None, path.read_text()
                await asyncio.sleep(0.02)
            self.port, self.metrics_port = int(found[1]), int(found[2])
            while not await self.is_ready():  # noqa: ASYNC110  # another process gets ready
                await asyncio.sleep(0.02)
        return self

    async def is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.metrics_port}/readyz"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status == 200

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it with a signal and returns its exit code; a negative one is a signal's."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 60)
