"""Builds the programs of `pins` from Go modules into one folder per set of versions, under the shared cache.

Called by `cli build`, `up` and the test helpers. A binary appears under its name only when it is whole; a lock makes
a second build wait for the first. Refuses to run without Go, and says how to get it.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import install, pins
from cluster.errors import BuildFailed
from cluster.places import GO_SOURCES, cache_dir, tail
from cluster.say import say

HEARTBEAT_S = 15.0


def bin_dir() -> Path:
    """The folder of the pinned versions' binaries, whether built or not."""
    return cache_dir() / "bin" / _key()


def missing(subset: str) -> list[pins.Program]:
    """What a build of this subset would still have to link."""
    return [p for p in _programs(subset) if not _complete(p)]


def build(subset: str = "all") -> Path:
    """Builds what is missing and returns the folder."""
    folder = bin_dir()
    if not missing(subset):
        return folder
    go = install.require_go()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        # Another build may have done it while we waited.
        todo = [p for p in missing(subset) if not _reuse(p, folder)]
        if todo:
            say(f"building {len(todo)} programs with {install.go_version_text(go)} into {folder}")
        for number, program in enumerate(todo, 1):
            _build_one(go, program, folder, f"[{number}/{len(todo)}]")
    return folder


def _programs(subset: str) -> list[pins.Program]:
    return [p for p in pins.PROGRAMS if subset == "all" or subset in p.subsets]


def _complete(program: pins.Program) -> bool:
    return all((bin_dir() / name).exists() for name in (program.name, *program.called))


def _key() -> str:
    """Names the folder: every pin, flag and source that decides what the binaries are."""
    keys = "".join(_program_key(p) for p in pins.PROGRAMS)
    return hashlib.sha256(keys.encode()).hexdigest()[:12]


def _program_key(program: pins.Program) -> str:
    digest = hashlib.sha256(repr((platform.machine(), program)).encode())
    for path in sorted((GO_SOURCES / program.module).rglob("*")) if program.module else ():
        if path.is_file():
            digest.update(f"{path.relative_to(GO_SOURCES)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _reuse(program: pins.Program, folder: Path) -> bool:
    """Takes the same program from the folder of another set of versions, as a hard link."""
    for mark in folder.parent.glob(f"*/.{program.name}.key"):
        built = mark.parent / program.name
        if mark.parent != folder and built.exists() and mark.read_text() == _program_key(program):
            temporary = folder / f".{program.name}.link"
            temporary.unlink(missing_ok=True)
            os.link(built, temporary)
            _publish(program, temporary, folder)
            return True
    return False


def _publish(program: pins.Program, built: Path, folder: Path) -> None:
    """Gives a finished file its names."""
    os.replace(built, folder / program.name)
    for name in program.called:
        link = folder / f".{name}.link"
        link.unlink(missing_ok=True)
        link.symlink_to(program.name)
        os.replace(link, folder / name)
    (folder / f".{program.name}.key").write_text(_program_key(program))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is under way; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _command(go: str, program: pins.Program, target: Path) -> tuple[list[str], Path, dict[str, str]]:
    """What to run, where, with which environment: the whole difference between the two kinds of programs."""
    env = dict(os.environ, GOFLAGS="-buildvcs=false", GOWORK="off")
    if not program.cgo:
        env["CGO_ENABLED"] = "0"
    flags = ["-v", "-ldflags", f"-s -w {program.ldflags}".strip()]
    if program.tags:
        flags += ["-tags", program.tags]
    if program.module:
        command = [go, "build", *flags, "-mod=readonly", "-o", str(target / program.name), program.package]
        return command, GO_SOURCES / program.module, env
    env["GOBIN"] = str(target)
    return [go, "install", *flags, f"{program.package}@{program.version}"], target, env


def _build_one(go: str, program: pins.Program, folder: Path, counter: str) -> None:
    label = f"{counter} {program.name} {program.version}".rstrip()
    started = time.monotonic()
    log = folder / f".{program.name}.log"
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as temporary:
        target = Path(temporary)
        command, cwd, env = _command(go, program, target)
        say(f"{label} …")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            try:
                while True:
                    try:
                        code = process.wait(timeout=HEARTBEAT_S)
                        break
                    except subprocess.TimeoutExpired:
                        _heartbeat(label, log, started)
            except BaseException:
                process.kill()
                process.wait()
                raise
        if code != 0:
            raise BuildFailed(
                f"building {program.name} failed ({' '.join(command[:2])} … ended with {code})",
                log_tail=tail(log),
                remedy=f"read {log}; Go modules must be reachable (GOPROXY) on the first build; then run this again",
            )
        _publish(program, target / program.name, folder)
        log.unlink()
    say(f"{label} built in {time.monotonic() - started:.0f} s")


def _heartbeat(label: str, log: Path, started: float) -> None:
    lines = log.read_text(errors="replace").splitlines()
    packages = sum(1 for line in lines if line and not line.startswith("go:"))
    what = f"{packages} packages compiled" if packages else f"{len(lines)} modules fetched"
    say(f"{label} … {time.monotonic() - started:.0f} s, {what}")


def remove_old(keep: int = 2) -> None:
    """Drops folders of versions no longer pinned, newest kept; half a gigabyte each."""
    root = cache_dir() / "bin"
    if not root.is_dir():
        return
    folders = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for folder in [p for p in folders if p != bin_dir()][keep - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "all"))
