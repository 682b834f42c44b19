"""Builds the images and pushes them, skipping what the registry already has.

An image is identified by a key: a digest of everything that goes into it. The registry stores it under that key, so an
unchanged image costs one request and needs no local store.
"""

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
from dataclasses import dataclass
from pathlib import Path

from cluster.places import REPOSITORY, cache_dir
from cluster.say import say
from images import base, buildah, registry

SOURCES = ("crds", "operator", "runtime")
FILES = ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "requirements-build.lock")
FILES_OF_HACK = (
    "hack/bootstrap.lock",
    "hack/images/trim_cpu.py",
    "hack/images/elf_stub.py",
    "hack/images/triton_driver.py",
    "hack/images/base.py",
)
FILES_OF_VLLM = ("bench/engines/vllm.txt",)
TARGETS = ("control", "runtime")
"""The images of the demo."""
ALL_TARGETS = (*TARGETS, "runtime-vllm")
_PIP_KEYS = ("index-url", "extra-index-url")
_UV_CACHE = "/uv-cache"


@dataclass(frozen=True)
class Image:
    """One target of the Dockerfile."""

    target: str
    cpu_only: bool

    @property
    def repository(self) -> str:
        return f"lorapool-{self.target}"

    def key(self) -> str:
        """A digest of sources, lock files and options."""
        digest = hashlib.sha256(repr((self.target, self.cpu_only and self.target != "control")).encode())
        names = [*FILES, *FILES_OF_HACK, f"requirements-{self.target}.lock"]
        names += FILES_OF_VLLM if self.target == "runtime-vllm" else ()
        paths = [REPOSITORY / name for name in names]
        for folder in SOURCES:
            paths += (p for p in sorted((REPOSITORY / folder).rglob("*")) if _counts(p))
        for path in paths:
            digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
        return f"k-{digest.hexdigest()[:16]}"


def _counts(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".so"}


def build(where: str, tag: str, targets: tuple[str, ...] = TARGETS, *, cpu_only: bool = True) -> dict[str, str]:
    """Pushes the images to the registry at `where` under `tag`, building what it lacks; target -> image reference."""
    registry.check(where)
    images = {Image(target, cpu_only): Image(target, cpu_only).key() for target in targets}
    missing = [image for image, key in images.items() if registry.manifest(where, image.repository, key) is None]
    if missing:
        with buildah.exclusive(), _wheel() as wheel:
            for image in missing:
                if registry.manifest(where, image.repository, images[image]) is None:
                    _build_and_push(image, images[image], where, wheel)
    references = {}
    for image, key in images.items():
        if image not in missing:
            say(f"{image.repository}: unchanged")
        content = registry.manifest(where, image.repository, key)
        assert content is not None, "buildah reported success"
        registry.tag(where, image.repository, content, tag)
        references[image.target] = f"{where}/{image.repository}:{tag}"
    return references


def _build_and_push(image: Image, key: str, where: str, wheel: list[str]) -> None:
    """`key` is that of the files as they were when the build was asked for."""
    began = time.monotonic()
    name = f"localhost/{image.repository}:latest"
    base_name = base.ensure()
    say(f"{image.repository}: building")
    # Without a wheel from this machine the stage `wheel` makes one, under a name of its own: no image is based on its
    # layers, and layers without a name are removed by `rmi --prune`.
    stages = [(image.target, name)] if wheel else [("wheel", "localhost/lorapool-wheel:latest"), (image.target, name)]
    for target, tag in stages:
        buildah.run(
            "bud", "--quiet", "--layers", "--format", "oci", "--pull-never", "--network", "host", *_mounts(), *wheel,
            *("--build-arg", f"BASE={base_name}", "--build-arg", f"CPU_ONLY={int(image.cpu_only)}"),
            *("--build-arg", f"UV_CACHE_DIR={_UV_CACHE}"),
            *("--target", target, "--tag", tag, "--file", str(REPOSITORY / "Dockerfile"), str(REPOSITORY)),
        )  # fmt: skip
    say(f"{image.repository}: built in {time.monotonic() - began:.0f} s, pushing")
    fast = ("--compression-format", "zstd", "--compression-level", "1")
    target = f"docker://{where}/{image.repository}:{key}"
    buildah.run("push", "--quiet", "--tls-verify=false", *fast, name, target)
    buildah.run("rmi", "--prune", quiet=True)  # layers of earlier builds, which no image is based on
    say(f"{image.repository}: built and pushed in {time.monotonic() - began:.0f} s")


@contextmanager
def _wheel() -> Iterator[list[str]]:
    """The option that puts a wheel made on this machine in place of the stage `wheel`; empty where none can be made.

    The wheel takes the native kernels that `make install` compiled. They run in the image only where this machine is
    of the image's Debian release; elsewhere the stage compiles its own.
    """
    hatchling = REPOSITORY / ".venv" / "bin" / "hatchling"
    make = shutil.which("make")
    if platform.freedesktop_os_release().get("VERSION_CODENAME") != base.SUITE or not (make and hatchling.exists()):
        yield []
        return
    subprocess.run([make, "-s", "native", f"PYTHON={sys.executable}"], cwd=REPOSITORY, stdout=sys.stderr, check=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder, "sources")
        shutil.copytree(REPOSITORY, sources, ignore=_not_in_wheel)
        done = subprocess.run(
            [hatchling, "build", "-t", "wheel", "-d", f"{folder}/context/dist"],
            cwd=sources, stdout=sys.stderr, check=False,
            env={**os.environ, "LORAPOOL_NATIVE": "compiled", "SOURCE_DATE_EPOCH": "1700000000", "PYTHONSAFEPATH": "1"},
        )  # fmt: skip
        yield ["--build-context", f"wheel={folder}/context"] if done.returncode == 0 else []


def _not_in_wheel(folder: str, names: list[str]) -> list[str]:
    kept = {*SOURCES, "pyproject.toml", "README.md", "LICENSE"}
    return [n for n in names if n == "__pycache__" or (folder == str(REPOSITORY) and n not in kept)]


def _mounts() -> list[str]:
    """What a build borrows from the machine: certificate authorities, uv's cache, and the package index of its pip."""
    pip, uv = cache_dir() / "pip.conf", cache_dir() / "uv.toml"
    options = _pip_options()
    _write_private(pip, "[global]\n" + "".join(f"{key} = {value}\n" for key, value in options.items()))
    _write_private(uv, _uv_settings(options))
    return [
        *("--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"),
        *("--volume", f"{pip}:/etc/pip.conf:ro", "--volume", f"{uv}:/etc/uv/uv.toml:ro"),
        *("--volume", f"{_uv_cache()}:{_UV_CACHE}"),
    ]


def _uv_cache() -> Path:
    """The cache in which `make install` left the unpacked wheels; made if it is absent."""
    uv = REPOSITORY / ".venv" / "bin" / "uv"
    if uv.exists():
        found = Path(subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip())
    else:
        found = cache_dir() / "uv"
    found.mkdir(parents=True, exist_ok=True)
    return found


def _pip_options() -> dict[str, str]:
    """Where the machine's pip looks for packages, if it was configured."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    pairs = (line.partition("=") for line in listed.splitlines())
    options = {name.rpartition(".")[2]: value.strip().strip("'") for name, _, value in pairs}
    return {key: options[key] for key in _PIP_KEYS if key in options}


def _uv_settings(options: dict[str, str]) -> str:
    """The same for uv, as TOML."""
    lines = ["system-certs = true"]
    if index := options.get("index-url"):
        lines.append(f'index-url = "{index}"')
    if more := options.get("extra-index-url"):
        lines.append(f"extra-index-url = [{', '.join(f'{chr(34)}{url}{chr(34)}' for url in more.split())}]")
    return "\n".join(lines) + "\n"


def _write_private(path: Path, text: str) -> None:
    """For its owner only: an index address may carry a password."""
    path.touch(mode=0o600)
    path.write_text(text)
