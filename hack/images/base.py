"""The base image: the official one where an image registry is reachable, else Debian's own Python by mmdebstrap.

The mirror is the one that the machine's own apt sources name, so that no address is written here.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from cluster.errors import ClusterError
from cluster.places import cache_dir
from cluster.programs import install
from cluster.say import say
from images import buildah

OFFICIAL = "python:3.11-slim-bookworm"
OWN = "localhost/lorapool-base:bookworm"
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates,usr-is-merged"
MERGED_USR = "/usr/share/mmdebstrap/hooks/merged-usr"
"""Links /bin to /usr/bin from the start; a package that does it later would need all of perl."""
PULL_TIMEOUT_S = 20
# What a container never reads.
UNREAD = ("/usr/share/doc", "/usr/share/man", "/usr/share/locale")


def ensure() -> str:
    """Makes sure that the store has a base image, and returns its name. Raises ClusterError."""
    for name in (OWN, OFFICIAL):
        if buildah.has_image(name):
            return name
    if not _archive().exists():
        try:
            buildah.run("pull", "--quiet", OFFICIAL, timeout_s=PULL_TIMEOUT_S, quiet=True)
            return OFFICIAL
        except ClusterError:
            say("no image registry is reachable: making the base image from Debian packages")
        _mmdebstrap()
    container = buildah.run("from", "scratch", quiet=True).strip()
    try:
        buildah.run("add", "--quiet", container, str(_archive()), "/", quiet=True)
        buildah.run("config", "--env", "LANG=C.UTF-8", "--cmd", "python3", container, quiet=True)
        buildah.run("commit", "--quiet", container, OWN, quiet=True)
    finally:
        buildah.run("rm", container, quiet=True)
    return OWN


def _archive() -> Path:
    return cache_dir() / "base" / f"debian-{SUITE}-python.tar"


def _mmdebstrap() -> None:
    archive = _archive()
    archive.parent.mkdir(parents=True, exist_ok=True)
    mirror = debian_mirror(_apt_sources())
    with tempfile.TemporaryDirectory(prefix=".mmdebstrap-", dir=archive.parent) as folder:
        partial, log = Path(folder, "root.tar"), archive.parent / "mmdebstrap.log"
        command = [
            install.require("mmdebstrap"), "--mode=root", "--variant=minbase", f"--include={PACKAGES}",
            *(f"--dpkgopt=path-exclude={unread}/*" for unread in UNREAD),
            f"--hook-dir={MERGED_USR}",
            "--dpkgopt=force-unsafe-io",  # what is killed is made again from nothing, so nothing need be on disk early
            '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
            '--customize-hook=rm -f "$1/etc/resolv.conf"',
            SUITE, str(partial), mirror,
        ]  # fmt: skip
        env = {**os.environ, "PATH": install.SEARCH_PATH, "DEBIAN_FRONTEND": "noninteractive", "TMPDIR": folder}
        with log.open("wb") as output:
            done = subprocess.run(command, stdout=output, stderr=output, check=False, timeout=1200, env=env)
        if done.returncode:
            raise ClusterError("mmdebstrap failed", log_tail=log.read_text()[-2000:], remedy=f"read {log}")
        os.replace(partial, archive)


def _apt_sources() -> str:
    paths = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    return "\n\n".join(p.read_text(errors="replace") for p in paths if p.is_file())


def debian_mirror(sources: str) -> str:
    """The first address in apt sources (either format) that serves the suite's `main`."""
    if own := os.environ.get("LORAPOOL_DEBIAN_MIRROR"):
        return own
    line: str
    for line in re.findall(rf"^deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+{SUITE}\s+main\b", sources, re.MULTILINE):
        return line
    for stanza in re.split(r"\n\s*\n", sources):
        fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.+)$", stanza, re.MULTILINE))
        if SUITE in fields.get("Suites", "").split() and "main" in fields.get("Components", "").split():
            return str(fields["URIs"]).split()[0]
    raise ClusterError(
        f"this machine's apt sources name no mirror of Debian {SUITE}",
        remedy="set LORAPOOL_DEBIAN_MIRROR to one, or make an image registry reachable",
    )
