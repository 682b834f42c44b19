"""A local cluster for tests marked `cluster`, and the host's state, to check that nothing is left behind."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, str(REPOSITORY / "hack" / "cluster"))


def cluster(*arguments: str, timeout_s: float = 1800) -> str:
    """Runs `hack/cluster`; its standard output, or an AssertionError with its report."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"hack/cluster {' '.join(arguments)} failed:\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    state: Path
    kubeconfig: Path
    bin_dir: Path
    prometheus_url: str
    registry: str

    @classmethod
    def up(cls, name: str, state: Path, *arguments: str) -> "Cluster":
        about = json.loads(cluster("up", "--name", name, "--state", str(state), "--json", *arguments))
        return cls(state, Path(about["kubeconfig"]), Path(about["bin_dir"]), about["prometheus_url"], about["registry"])

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        command = [str(self.bin_dir / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def process(self) -> int:
        """The host's pid of the cluster's root process."""
        return int(json.loads((self.state / "process.json").read_text())["pid"])


def command_lines() -> dict[int, str]:
    """Every process of the machine: number -> command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def network_namespaces() -> set[str]:
    """Network namespaces that have a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(str(path.readlink()))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Polls; an AssertionError after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)
