"""Takes single programs out of Debian packages without installing them, so that no service of theirs is started."""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.errors import MissingToolError
from cluster.programs import install
from cluster.say import say


def take_programs(packages: Mapping[str, Sequence[str]], target: Path) -> None:
    """Gives `target` every named program: a link to the machine's own, else the file from its package.

    Raises MissingToolError when a package cannot be had.
    """
    for package, programs in packages.items():
        own = [install.find(program) for program in programs]
        if all(own):
            for program, path in zip(programs, own, strict=True):
                (target / program).symlink_to(str(path))
        else:
            _unpack(package, programs, target)


def take_packages(packages: Sequence[str], target: Path) -> None:
    """Unpacks whole packages into the folder `target`, which it makes. Raises MissingToolError."""
    for package in packages:
        say(f"fetching Debian's package {package}")
        with tempfile.TemporaryDirectory(prefix=".package-", dir=target.parent) as name:
            archive = _download(package, Path(name))
            _run(["dpkg", "--extract", str(archive), str(target)], package)


def missing_packages(packages: Sequence[str]) -> list[str]:
    """These packages and all that they need, without what the machine has installed. Raises MissingToolError."""
    command = ["apt-get", "-q", "install", "--simulate", "--no-install-recommends", *packages]
    try:
        listed = _run(command, packages[0])
    except MissingToolError:  # apt's lists may be absent or old
        _run(["apt-get", "-q", "update"], packages[0])
        listed = _run(command, packages[0])
    return [line.split()[1] for line in listed.splitlines() if line.startswith("Inst ")]


def _unpack(package: str, programs: Sequence[str], target: Path) -> None:
    say(f"fetching Debian's package {package}")
    with tempfile.TemporaryDirectory(prefix=".package-", dir=target.parent) as name:
        folder = Path(name)
        archive = _download(package, folder)
        _run(["dpkg", "--extract", str(archive), str(folder / "root")], package)
        for program in programs:
            (folder / "root" / "usr" / "bin" / program).rename(target / program)


def _download(package: str, folder: Path) -> Path:
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
    try:
        _run(command, package, folder)
    except MissingToolError:  # apt's lists may be absent or old
        _run(["apt-get", "-q", "update"], package)
        _run(command, package, folder)
    return next(folder.glob("*.deb"))


def _run(command: list[str], package: str, cwd: Path | None = None) -> str:
    remedy = f"install {package} by hand; its programs are then found on PATH"
    env = dict(os.environ, PATH=install.SEARCH_PATH)
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise MissingToolError(f"this machine has neither {package} nor {command[0]}", remedy=remedy) from None
    if done.returncode:
        what = f"`{' '.join(command)}` ended with {done.returncode}"
        raise MissingToolError(f"cannot fetch {package}: {what}", log_tail=done.stderr[-2000:], remedy=remedy)
    return done.stdout
