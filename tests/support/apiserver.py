"""A real API server for tests marked `apiserver`: etcd and kube-apiserver as processes on free ports of 127.0.0.1.

Each server has its own state, ports and token, so tests may run concurrently. It ends with `stop()`, and by itself
when the test process dies. The first start on a machine builds the programs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_COMMAND = (sys.executable, str(REPOSITORY / "hack" / "cluster"))
_BUILD_TIMEOUT_S = 1800
_START_TIMEOUT_S = 180
CRDS_TIMEOUT_S = 30


@dataclass(frozen=True)
class ApiServer:
    """A running API server and how to reach it."""

    url: str
    kubeconfig: Path
    ca_file: Path
    token: str  # of a cluster admin
    bin_dir: Path  # contains kubectl
    audit_log: Path
    state: Path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Runs kubectl as admin and returns its output. Raises AssertionError with its error output."""
        command = [str(self.bin_dir / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def install_crds(self, *paths: Path) -> None:
        """Applies CRDs and waits until the server serves them."""
        for path in paths:
            self.kubectl("apply", "--server-side", "-f", str(path))
        deadline = time.monotonic() + CRDS_TIMEOUT_S
        while True:
            try:
                return self._established()
            except AssertionError:  # kubectl refuses to wait for an object that has no conditions at all yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _established(self) -> None:
        self.kubectl("wait", "--for=condition=Established", "crd", "--all", f"--timeout={CRDS_TIMEOUT_S}s")

    def interrupt(self) -> None:
        """Stops the API server's process; etcd keeps running. `resume` starts it again on the same address."""
        _cluster("stop", "--state", str(self.state), "kube-apiserver")

    def resume(self) -> None:
        """Starts it again; returns at once, before it answers."""
        _cluster("start", "--state", str(self.state), "kube-apiserver")

    def stop(self) -> None:
        """Ends the server and removes its files."""
        _cluster("down", "--state", str(self.state), "--purge")


def leader_worker_sets() -> Path:
    """The definition of LeaderWorkerSets; its project's controller is not run."""
    return Path(_cluster("crd", "leaderworkersets").strip())


def start_apiserver(tmp_path: Path, *, controllers: bool = False) -> ApiServer:
    """Starts a server with its files below `tmp_path`. With `controllers`, owned objects are garbage-collected."""
    _cluster("build", timeout_s=_BUILD_TIMEOUT_S)
    state = tmp_path / "apiserver"
    arguments = ["--apiserver-only", "--name", "test", "--state", str(state), "--while-pid", str(os.getpid()), "--json"]
    if not controllers:
        arguments.append("--no-controllers")
    about = json.loads(_cluster("up", *arguments))
    return ApiServer(
        url=about["api_url"],
        kubeconfig=Path(about["kubeconfig"]),
        ca_file=Path(about["ca_file"]),
        token=about["token"],
        bin_dir=Path(about["bin_dir"]),
        audit_log=Path(about["audit_log"]),
        state=state,
    )


@contextmanager
def running_apiserver(tmp_path: Path, *, controllers: bool = False) -> Iterator[ApiServer]:
    """`start_apiserver` for a `with` block or a fixture."""
    server = start_apiserver(tmp_path, controllers=controllers)
    try:
        yield server
    finally:
        server.stop()


def _cluster(*arguments: str, timeout_s: float = _START_TIMEOUT_S) -> str:
    done = subprocess.run(
        [*_COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"hack/cluster {arguments[0]} failed:\n{done.stderr}"
    return done.stdout
