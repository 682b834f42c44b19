"""Custom resource definitions of other projects, for tests: out of their Go modules, and cached by version.

Go fetches and verifies the module as it does those that the programs are built from; nothing of it is compiled.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from cluster.errors import BuildFailedError
from cluster.places import cache_dir
from cluster.programs import install, pins


def definition(name: str) -> Path:
    """The YAML file of a definition of `pins`. Raises BuildFailedError, or MissingToolError without Go."""
    pinned = pins.DEFINITIONS[name]
    kept = cache_dir() / "crds" / f"{name}-{pinned.version}.yaml"
    if not kept.exists():
        module = _fetch(pinned)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=kept.parent) as temporary:
            made = Path(temporary, kept.name)
            shutil.copyfile(module / pinned.path, made)
            made.rename(kept)
    return kept


def _fetch(pinned: pins.Definition) -> Path:
    """The folder of the module's files, which the pinned sum proves."""
    module = f"{pinned.module}@{pinned.version}"
    command = [install.require_go(), "mod", "download", "-json", module]
    env = dict(os.environ, GOFLAGS="", GOWORK="off")
    with tempfile.TemporaryDirectory() as elsewhere:  # outside any module, whose own requirements would count
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=env, check=False)
    found = json.loads(done.stdout or "{}")
    if done.returncode != 0:
        raise BuildFailedError(
            f"Go could not fetch {module}: {found.get('Error') or done.stderr.strip()}",
            remedy="Go modules must be reachable (GOPROXY) the first time; then run this again",
        )
    if found["Sum"] != pinned.sum:
        raise BuildFailedError(f"{module} has the sum {found['Sum']}, not the pinned {pinned.sum}")
    return Path(found["Dir"])
