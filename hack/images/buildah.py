"""buildah with a store of our own below the cache, so that pruning never touches the user's images."""

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError, MissingToolError
from cluster.places import cache_dir
from cluster.programs import install
from cluster.say import say


def store() -> Path:
    return cache_dir() / "buildah"


def run(*arguments: str, timeout_s: float = 3600, quiet: bool = False) -> str:
    """Runs buildah; its standard output. Progress goes to standard error as it comes, unless `quiet`."""
    if os.geteuid() != 0:
        raise MissingToolError("building images needs root", remedy="run it as root")
    store().mkdir(parents=True, exist_ok=True)
    command = [install.require("buildah"), "--root", str(store()), "--runroot", "/run/lorapool-buildah", *arguments]
    env = dict(os.environ, STORAGE_DRIVER="overlay", BUILDAH_ISOLATION="chroot", PATH=install.SEARCH_PATH)
    env["TMPDIR"] = str(store() / "tmp")  # layers that are being written
    (store() / "tmp").mkdir(exist_ok=True)
    stderr = subprocess.PIPE if quiet else None
    try:
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ClusterError(f"buildah {arguments[0]} took longer than {timeout_s:.0f} s") from None
    if done.returncode:
        raise ClusterError(
            f"buildah {arguments[0]} failed ({done.returncode})",
            log_tail=done.stderr or done.stdout[-4000:],
            remedy="its last lines say which step; run the same again after fixing it, finished steps are kept",
        )
    return done.stdout


@contextmanager
def exclusive() -> Iterator[None]:
    """Locks the store for one build; removes working containers (and their mounts) before and after it."""
    store().mkdir(parents=True, exist_ok=True)
    with (store().parent / "buildah.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build of images is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        run("rm", "--all", quiet=True)
        try:
            yield
        finally:
            run("rm", "--all", quiet=True)


def has_image(name: str) -> bool:
    try:
        run("inspect", "--type", "image", name, quiet=True)
    except ClusterError:
        return False
    return True
