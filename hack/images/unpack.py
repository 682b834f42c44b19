"""Unpacks an image into the containerd of a cluster that is not up, so that the cluster need not wait for it.

A containerd of its own, in a mount namespace of its own, writes into the folder that the cluster's containerd will use;
both end with this process.
"""

import multiprocessing
import subprocess
import time
from pathlib import Path

from cluster import kernel
from cluster.errors import ClusterError
from cluster.programs import install
from cluster.say import say
from images import registry
from images.build import Image

SOCKET = "/run/containerd/containerd.sock"
NAME = "lorapool.local/unpacked:latest"
"""Keeps the layers; the next image takes the name over, so that containerd removes what only the earlier one used."""
START_TIMEOUT_S = 30
PULL_TIMEOUT_S = 900


def unpack(image: Image, state: Path) -> None:
    """Raises ClusterError when the registry's storage lacks the image, or when it cannot be unpacked."""
    began = time.monotonic()
    with registry.serving() as where:
        if registry.manifest(where, image.repository, image.key()) is None:
            raise ClusterError(f"{image.repository} is not built", remedy="`python3 hack/images build`")
        process = multiprocessing.get_context("fork").Process(
            target=_pull, args=(f"{where}/{image.repository}:{image.key()}", state)
        )
        process.start()
        process.join()
    if process.exitcode:
        raise ClusterError(
            f"cannot unpack {image.repository} into {state}", remedy=f"read {_log(state)}; `make demo-down` clears it"
        )
    say(f"{image.repository}: unpacked in {time.monotonic() - began:.0f} s")


def _pull(reference: str, state: Path) -> None:
    kernel.die_with_parent()
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    _log(state).parent.mkdir(parents=True, exist_ok=True)
    config = state / "unpack.toml"
    config.write_text(f'version = 2\nroot = "{state}/containerd"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    with _log(state).open("wb") as log:
        containerd = subprocess.Popen(
            [install.require("containerd"), "--config", str(config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=kernel.die_with_parent,
        )  # fmt: skip
        try:
            _wait_for_socket()
            for arguments in (
                ("pull", "--plain-http", reference),
                ("tag", "--force", reference, NAME),
                ("rm", reference),
            ):
                subprocess.run(
                    [install.require("ctr"), "--namespace", "k8s.io", "images", *arguments],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=PULL_TIMEOUT_S,
                )  # fmt: skip
        finally:
            containerd.terminate()  # it closes its database
            containerd.wait()
            config.unlink()


def _log(state: Path) -> Path:
    return state / "log" / "unpack.log"


def _wait_for_socket() -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not Path(SOCKET).exists():
        if time.monotonic() > deadline:
            raise ClusterError("containerd does not start")
        time.sleep(0.05)
