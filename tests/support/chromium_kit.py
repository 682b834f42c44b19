"""A real Chromium for tests of pages: the machine's own, or Debian's package with what the machine lacks for it.

Packages are unpacked once into Lorapool's cache, without being installed. Playwright drives the program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from playwright.async_api import Browser, async_playwright

sys.path.append(str(Path(__file__).parents[2] / "hack"))

from cluster.places import cache_dir
from cluster.programs import install
from cluster.programs.debian import missing_packages, take_packages

PACKAGES = ("chromium", "fonts-dejavu-core", "fontconfig-config")


def program() -> tuple[Path, dict[str, str]]:
    """The program and the environment to start it with."""
    if own := install.find("chromium"):
        return Path(own), dict(os.environ)
    folder = cache_dir() / "chromium-debian"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / ".chromium.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=".chromium-", dir=folder.parent) as name:
                take_packages(missing_packages(PACKAGES), Path(name) / "root")
                (Path(name) / "root").rename(folder)
    machine = f"{os.uname().machine}-linux-gnu"
    libraries = [
        folder / "usr/lib" / machine,
        folder / "usr/lib" / machine / "pulseaudio",
        folder / "lib" / machine,
        folder / "usr/lib",
    ]
    environment = dict(os.environ, LD_LIBRARY_PATH=os.pathsep.join(map(str, libraries)))
    if (fonts := folder / "etc/fonts").exists() and not Path("/etc/fonts/fonts.conf").exists():
        environment["FONTCONFIG_PATH"] = str(fonts)
    environment["XDG_DATA_HOME"] = str(folder / "usr/share")
    return folder / "usr/lib/chromium/chromium", environment


def version() -> str:
    path, environment = program()
    return subprocess.run([path, "--version"], env=environment, capture_output=True, text=True, check=True).stdout


@contextlib.asynccontextmanager
async def chromium(arguments: Sequence[str] = ()) -> AsyncIterator[Browser]:
    """A headless browser. Without its sandbox, which root cannot have; it opens pages of tests alone."""
    path, environment = program()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=path,
            env=dict(environment),
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb", *arguments],
            timeout=120_000,
        )
        try:
            yield browser
        finally:
            await browser.close()
