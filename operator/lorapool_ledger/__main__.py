"""`python -m lorapool_ledger`: reads the settings and serves the ledger until SIGTERM or SIGINT, or runs a command.

The only module that reads the environment. Exit code 2: settings or a database that cannot work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from lorapool_api.logs import set_up_logs
from lorapool_api.settings import SettingsError
from lorapool_api.trust.runtime_tokens import MasterTokens, RuntimeTokens
from lorapool_gateway.routing.kube import Kube
from lorapool_gateway.routing.watch import KubeSource
from lorapool_ledger import commands
from lorapool_ledger.process import running
from lorapool_ledger.settings import Settings, read_settings
from lorapool_ledger.store.database import LedgerDatabaseError


async def serve(settings: Settings, own: MasterTokens, runtimes: RuntimeTokens) -> None:
    """Serves until a signal arrives, also one that arrives while the database is waited for."""
    stop, started = asyncio.Event(), False
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def on_signal() -> None:
        stop.set()
        if task is not None and not started:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    kube = await Kube.connect(settings.kubeconfig)
    try:
        source = KubeSource(kube, settings.namespaces, settings.keys_namespace, lambda kind: None)
        async with running(settings, own, runtimes, source):
            started = True
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        await kube.close()


def main() -> None:
    try:
        settings = read_settings(os.environ)
        set_up_logs("ledger", settings.log_level, settings.log_format)
        if len(sys.argv) > 1:
            sys.exit(commands.run(sys.argv[1:], settings))
        own = MasterTokens.from_file(settings.token_file)
        asyncio.run(serve(settings, own, RuntimeTokens.from_file(settings.master_token_file)))
    except SettingsError as error:
        error.report("lorapool-ledger")
        sys.exit(2)
    except LedgerDatabaseError as error:
        SettingsError(str(error)).report("lorapool-ledger")
        sys.exit(2)


if __name__ == "__main__":
    main()
