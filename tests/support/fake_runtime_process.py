"""FakeRuntime as a process with the settings of a real one: `python tests/support/fake_runtime_process.py`.

It accepts any bearer token, and resolves each source to the digest of its URI.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import fakes
from aiohttp import web

from lorapool_api.protocol import ENV_TOKEN_SHA256_FILE, ResolveAnswer, ResolveRequest, RuntimeSnapshot

DRAIN_S = 0.5
"""Requests that arrive after SIGTERM are refused as draining for this long, as a real runtime does."""


class ResolvingRuntime(fakes.FakeRuntime):
    last_request_unix_s: float | None = None

    def snapshot(self) -> RuntimeSnapshot:
        return super().snapshot().model_copy(update={"last_request_unix_s": self.last_request_unix_s})

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        self.last_request_unix_s = time.time()
        return await super()._infer(request)

    async def _resolve(self, request: web.Request) -> web.Response:
        uri = ResolveRequest.model_validate(await request.json()).source.uri
        return web.json_response(ResolveAnswer(digest=fakes.digest_of(uri), rank=8, size_bytes=1).dump())


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    runtime = ResolvingRuntime()
    async with runtime.running(int(os.environ["LORAPOOL_RUNTIME_LISTEN_PORT"])):
        await stop.wait()
        runtime.faults.draining = True
        runtime.change()
        await asyncio.sleep(DRAIN_S)


if __name__ == "__main__":
    accepted = Path(os.environ[ENV_TOKEN_SHA256_FILE]).read_text().split()[0]
    fakes.token_sha256 = lambda text: accepted  # any token is right, and polls are answered with the true proof
    asyncio.run(main())
