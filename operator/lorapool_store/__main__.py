"""`python -m lorapool_store`: reads the settings and serves the store until SIGTERM or SIGINT.

The only module that reads the environment. Exit code 2: settings that cannot work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from lorapool_api.logs import set_up_logs
from lorapool_api.settings import SettingsError
from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_store.process import running
from lorapool_store.settings import Settings, read_settings


async def serve(settings: Settings, masters: MasterTokens) -> None:
    """Serves until a signal arrives."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings, masters):
        await stop.wait()


def main() -> None:
    try:
        settings = read_settings(os.environ)
        set_up_logs("store", settings.log_level, settings.log_format)
        asyncio.run(serve(settings, MasterTokens.from_file(settings.master_token_file)))
    except SettingsError as error:
        error.report("lorapool-store")
        sys.exit(2)


if __name__ == "__main__":
    main()
