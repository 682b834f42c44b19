"""A real PostgreSQL 15 server of a test's own: Debian's programs, a folder for its data, a Unix socket, no TCP port.

The machine's own programs are used if it has them. Otherwise Debian's packages are unpacked once into Lorapool's cache,
without being installed, so that no service starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

sys.path.append(str(Path(__file__).parents[2] / "hack"))

from cluster.places import cache_dir
from cluster.programs.debian import take_packages

VERSION = "15"
OWN = Path("/usr/lib/postgresql") / VERSION
PACKAGES = (
    f"postgresql-{VERSION}",
    f"postgresql-client-{VERSION}",
    "libpq5",
    "libicu72",
    "libxml2",
    "libldap-2.5-0",
    "libsasl2-2",
    "libgssapi-krb5-2",
    "libkrb5-3",
    "libk5crypto3",
    "libkrb5support0",
    "libkeyutils1",
    "libxslt1.1",
)
"""The server with the libraries that a small Debian 12 lacks."""
UNPRIVILEGED = 65534
_START_TIMEOUT_S = 60.0


def programs() -> tuple[Path, dict[str, str]]:
    """Returns the folder of initdb and postgres, and the environment to start them with."""
    if (OWN / "bin" / "initdb").exists():
        return OWN / "bin", dict(os.environ)
    folder = cache_dir() / f"postgresql-{VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".postgresql-{VERSION}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=".postgresql-", dir=folder.parent) as name:
                take_packages(PACKAGES, Path(name) / "root")
                (Path(name) / "root").chmod(0o755)
                (Path(name) / "root").rename(folder)
    libraries = [folder / "usr/lib" / f"{os.uname().machine}-linux-gnu", folder / "usr/lib"]
    return folder / f"usr/lib/postgresql/{VERSION}/bin", dict(
        os.environ, LD_LIBRARY_PATH=os.pathsep.join(map(str, libraries))
    )


@dataclass
class Postgres:
    """A server and its folder. PostgreSQL refuses to run as root: then its processes have an account without rights."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    _names: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._bin, self._environ = programs()
        self._account: dict[str, int] = {}
        if os.geteuid() == 0:
            self._account = {"user": UNPRIVILEGED, "group": UNPRIVILEGED}
            os.chown(self.folder, UNPRIVILEGED, UNPRIVILEGED)
        self.folder.chmod(0o700 if os.geteuid() else 0o755)

    def start(self) -> Postgres:
        """Starts the server and waits until it accepts connections; makes its folder at the first start."""
        data = self.folder / "data"
        if not data.exists():
            self._run("initdb", "-D", str(data), "-U", "ledger", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    self._bin / "postgres",
                    *("-D", str(data), "-k", str(self.folder), "-h", ""),
                    *("-c", "max_connections=60", "-c", "shared_buffers=64MB"),
                ],
                cwd=self.folder,
                env=self._environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                **self._account,
            )
        end = time.monotonic() + _START_TIMEOUT_S
        while subprocess.run(
            [self._bin / "pg_isready", "-q", "-h", str(self.folder)], env=self._environ, check=False
        ).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            assert time.monotonic() < end, "PostgreSQL did not start in time"
            time.sleep(0.05)
        return self

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """Ends the server; SIGQUIT ends it as a crash does, SIGINT in order."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(60)

    def database(self) -> str:
        """Makes an empty database and returns its URL."""
        name = f"test{next(self._names)}"
        self._run("createdb", "-h", str(self.folder), "-U", "ledger", name)
        return self.url(name)

    def url(self, name: str) -> str:
        """The URL of a database that was made."""
        return f"postgresql://ledger@/{name}?host={quote(str(self.folder), safe='')}"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments],
            cwd=self.folder,
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
            **self._account,
        )
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server in a folder with a short path (a Unix socket's path has 107 bytes at most)."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    server = Postgres(folder)
    try:
        yield server.start()
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
