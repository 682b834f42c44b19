"""Builds the two images and pushes them, skipping whatever the registry already has.

Called by `cli`. An image is known by a key over everything that goes into it; the registry keeps it under that key,
so an unchanged image costs one request and needs no local store at all.
"""

import hashlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.places import REPOSITORY, cache_dir
from cluster.say import say
from images import base, buildah, registry

SOURCES = ("crds", "operator", "runtime")
FILES = ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "requirements-build.lock")
TARGETS = ("control", "runtime")
_PIP_KEYS = ("index-url", "extra-index-url", "trusted-host")


@dataclass(frozen=True)
class Image:
    """One target of the Dockerfile."""

    target: str
    cpu_only: bool

    @property
    def repository(self) -> str:
        return f"lorapool-{self.target}"

    def key(self) -> str:
        """Names the content: sources, locks and options."""
        digest = hashlib.sha256(repr((self.target, self.cpu_only and self.target == "runtime")).encode())
        names = [*FILES, f"requirements-{self.target}.lock", "hack/images/trim_cpu.py", "hack/images/base.py"]
        paths = [REPOSITORY / name for name in names]
        for folder in SOURCES:
            paths += (p for p in sorted((REPOSITORY / folder).rglob("*")) if _counts(p))
        for path in paths:
            digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
        return f"k-{digest.hexdigest()[:16]}"


def _counts(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".so"}


def build(where: str, tag: str, targets: tuple[str, ...] = TARGETS, *, cpu_only: bool = True) -> dict[str, str]:
    """target -> image reference in that registry."""
    registry.check(where)
    references = {}
    for target in targets:
        image = Image(target, cpu_only)
        key = image.key()
        content = registry.manifest(where, image.repository, key)
        if content is None:
            with buildah.exclusive():
                if registry.manifest(where, image.repository, key) is None:
                    _build_and_push(image, where, key)
            content = registry.manifest(where, image.repository, key)
            assert content is not None, "buildah said it pushed the image"
        else:
            say(f"{image.repository}: unchanged")
        registry.tag(where, image.repository, content, tag)
        references[target] = f"{where}/{image.repository}:{tag}"
    return references


def _build_and_push(image: Image, where: str, key: str) -> None:
    began = time.monotonic()
    name = f"localhost/{image.repository}:latest"
    base_name = base.ensure()
    say(f"{image.repository}: building" + (" (torch is fetched once: minutes)" if image.target == "runtime" else ""))
    # The stage of the wheel by a name of its own: no image stands on its layers, and without a name they would go with
    # what is pruned below, compiler and all.
    for target, tag in (("wheel", "localhost/lorapool-wheel:latest"), (image.target, name)):
        buildah.run(
            "bud", "--layers", "--format", "oci", "--pull-never", "--network", "host", *_mounts(),
            *("--build-arg", f"BASE={base_name}", "--build-arg", f"CPU_ONLY={int(image.cpu_only)}"),
            *("--target", target, "--tag", tag, "--file", str(REPOSITORY / "Dockerfile"), str(REPOSITORY)),
        )  # fmt: skip
    say(f"{image.repository}: pushing")
    fast = ("--compression-format", "zstd", "--compression-level", "1")
    buildah.run("push", "--quiet", "--tls-verify=false", *fast, name, f"docker://{where}/{image.repository}:{key}")
    buildah.run("rmi", "--prune", quiet=True)  # layers of earlier builds that nothing is on top of
    buildah.drop_download_cache()  # kept only while a build may have to be repeated
    say(f"{image.repository}: built and pushed in {time.monotonic() - began:.0f} s")


def _mounts() -> list[str]:
    """What a build borrows from the machine: its certificate authorities, and where its pip looks for packages."""
    mounts = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    lines = []
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in _PIP_KEYS:
            lines.append(f"{option} = {value.strip().strip(chr(39))}")
    if lines:
        file = cache_dir() / "pip.conf"
        file.write_text("[global]\n" + "\n".join(lines) + "\n")
        file.chmod(0o600)
        mounts += ["--volume", f"{file}:/etc/pip.conf:ro"]
    return mounts
