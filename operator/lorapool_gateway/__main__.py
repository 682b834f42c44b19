"""`python -m lorapool_gateway`: reads the settings and serves the objects of the API server until SIGTERM or SIGINT.

The only module that reads the environment. Exit code 2: settings that cannot work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lorapool_api.logs import set_up_logs
from lorapool_api.settings import SettingsError
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.process import GatewayProcess, drain, run, running
from lorapool_gateway.routing.kube import Kube
from lorapool_gateway.routing.watch import KubeSource
from lorapool_gateway.settings import Settings, read_settings


@asynccontextmanager
async def serving_cluster(settings: Settings, tokens: RuntimeTokens) -> AsyncIterator[GatewayProcess]:
    """Serves the objects of the API server inside the context."""
    metrics = Metrics(settings.max_tracked_adapters)
    kube = await Kube.connect(settings.kubeconfig)
    try:
        source = KubeSource(kube, settings.namespaces, settings.keys_namespace, metrics.watch_failed)
        async with running(settings, tokens, source, kube, metrics, kube) as process:
            yield process
    finally:
        await kube.close()


async def serve(settings: Settings, tokens: RuntimeTokens) -> None:
    """Serves until a signal arrives, then drains."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving_cluster(settings, tokens) as process:
        await stop.wait()
        await drain(process, settings)


def main() -> None:
    try:
        settings = read_settings(os.environ)
        tokens = RuntimeTokens.from_file(settings.master_token_file)
    except SettingsError as error:
        error.report("lorapool-gateway")
        sys.exit(2)
    set_up_logs("gateway", settings.log_level, settings.log_format)
    run(serve(settings, tokens))


if __name__ == "__main__":
    main()
