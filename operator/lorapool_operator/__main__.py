"""`python -m lorapool_operator`: reads the settings once, then runs the process until a signal ends it.

Exits with 0 after a signal, 1 when the Lease was lost (the kubelet starts the container again as a standby), 2 when the
settings are invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from lorapool_api.logs import set_up_logs
from lorapool_api.settings import SettingsError
from lorapool_artifacts.policy import PolicyError
from lorapool_operator.access import AccessError
from lorapool_operator.process import Process
from lorapool_operator.settings import Settings, read_settings
from lorapool_operator.world.profiles import ProfilesError

log = logging.getLogger("lorapool_operator")

CHATTY = ("kopf", "kubernetes.aio", "aiohttp.access", "urllib3", "httpx")
"""Loggers of libraries that write a line per event, login or request."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="lorapool-operator", description="Run Lorapool's operator.")
    parser.add_argument(
        "--kubeconfig", type=Path, help="for use outside a cluster; default: the service account, else KUBECONFIG"
    )
    arguments = parser.parse_args()
    try:
        settings = read_settings(os.environ, kubeconfig=arguments.kubeconfig)
    except SettingsError as error:
        error.report("lorapool-operator")
        return 2
    set_up_logs("operator", settings.log_level, settings.log_format, quiet=CHATTY)
    return asyncio.run(_run(settings))


async def _run(settings: Settings) -> int:
    try:
        process = Process(settings, sources=settings.sources)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, process.stop)
        await process.run()
    except (SettingsError, ProfilesError, PolicyError, AccessError) as error:
        log.error("cannot start", extra={"error": str(error)})
        return 2
    return 0 if process.stop_requested else 1


if __name__ == "__main__":
    sys.exit(main())
