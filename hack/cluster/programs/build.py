"""Makes the programs of `pins` and publishes them as one folder per set of versions, below the shared cache.

The folder is complete or absent: it is made under another name and renamed. A lock makes a second build wait for the
first. What Go has compiled stays in Go's own cache, so an interrupted build goes on where it stopped.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import BuildFailedError
from cluster.places import GO_SOURCES, cache_dir, tail
from cluster.programs import debian, install, pins
from cluster.say import say

HEARTBEAT_S = 15.0
INTERRUPT_GRACE_S = 10.0


def bin_dir() -> Path:
    """The folder of the pinned versions' programs, whether it exists or not."""
    return cache_dir() / "bin" / _key()


def build() -> Path:
    """Makes the folder if it is absent and returns it. Raises BuildFailedError, or MissingToolError without Go."""
    folder = bin_dir()
    if folder.exists():
        return folder
    go = install.require_go()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / ".lock"):
        if not folder.exists():  # another build may have made it while this one waited
            _build(go, folder)
    return folder


def _build(go: str, folder: Path) -> None:
    for leftover in folder.parent.glob(".building-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
        made = Path(temporary, "bin")
        made.mkdir()
        debian.take_programs(pins.FROM_DEBIAN, made)
        _compile(go, made, Path(temporary))
        for program, names in pins.LINKS.items():
            for name in names:
                (made / name).symlink_to(program)
        made.rename(folder)


def _key() -> str:
    """A digest of all that decides what the programs are: pins, flags and sources."""
    pinned = (pins.PACKAGES, pins.LINKS, pins.FROM_DEBIAN, pins.LINK_FLAGS, pins.COMPILE_FLAGS)
    digest = hashlib.sha256(repr((platform.machine(), pinned)).encode())
    for path in sorted(p for p in GO_SOURCES.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(GO_SOURCES)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(go: str, target: Path, temporary: Path) -> None:
    """Compiles and links all Go programs in one run of the Go command. C is not used, so no C compiler is needed."""
    say(f"compiling Kubernetes {pins.KUBERNETES}, etcd, CoreDNS and Helm with {install.go_version_text(go)}")
    flags = ["-v", "-mod=readonly", "-buildvcs=false", "-ldflags", pins.LINK_FLAGS, "-gcflags", pins.COMPILE_FLAGS]
    command = [go, "build", *flags, "-o", f"{target}/", *pins.PACKAGES]
    env = dict(os.environ, CGO_ENABLED="0", GOFLAGS="", GOWORK="off", GOTMPDIR=str(temporary))
    log = bin_dir().parent / "build.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=GO_SOURCES, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            code = _wait(process, log)
        except BaseException:
            _end(process)
            raise
    if code != 0:
        raise BuildFailedError(
            f"go build ended with {code}",
            log_tail=tail(log),
            remedy=f"read {log}; Go modules must be reachable (GOPROXY) on the first build; then run this again",
        )


def _wait(process: subprocess.Popen[bytes], log: Path) -> int:
    started = time.monotonic()
    while True:
        try:
            return process.wait(timeout=HEARTBEAT_S)
        except subprocess.TimeoutExpired:
            say(f"{_progress(log)}, {time.monotonic() - started:.0f} s")


def _progress(log: Path) -> str:
    """How far the Go command is, from its verbose output."""
    lines = log.read_text(errors="replace").splitlines()
    packages = sum(1 for line in lines if line and not line.startswith("go:"))
    return f"{packages} packages compiled" if packages else f"{len(lines)} modules fetched"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts the Go command, which then removes its work folder; kills it where it does not end in time."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=INTERRUPT_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def remove_old(keep: int = 2) -> None:
    """Removes folders of versions that are no longer pinned, except the newest; each is a third of a gigabyte."""
    root = cache_dir() / "bin"
    if not root.is_dir():
        return
    folders = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for folder in [p for p in folders if p != bin_dir()][keep - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
