"""Compares the locked dependencies of all images with published advisories, by pip-audit.

Exit status: 0 nothing is known, or no advisories can be reached, which is reported; 1 a locked version is vulnerable.
A package of which the service has no record is counted as not compared.
Arguments go to pip-audit, such as `--vulnerability-service osv --osv-url URL` for a mirror in a closed network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements-control.lock", "requirements-runtime.lock", "requirements-runtime-vllm.lock")
UNREACHABLE = ("ConnectionError", "Max retries exceeded", "ServiceError", "Could not connect", "timed out")


def main(arguments: list[str]) -> int:
    worst = 0
    for lock in LOCKS:
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--format", "json"]
        done = subprocess.run(
            [*command, "-r", str(ROOT / lock), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode and any(words in done.stderr for words in UNREACHABLE):
            print(f"{lock}: skipped, because no advisories can be reached: {done.stderr.strip().splitlines()[-1]}")
        elif done.stdout.strip():
            print(f"{lock}: {summary(json.loads(done.stdout)['dependencies'])}")
            worst = max(worst, done.returncode)
        else:
            print(f"{lock}: pip-audit failed: {done.stderr.strip()}")
            worst = max(worst, done.returncode)
    return worst


def summary(packages: list[dict[str, Any]]) -> str:
    """What is known of a lock file's packages, in one line and one line more for each vulnerability."""
    compared = [package for package in packages if "skip_reason" not in package]
    if not compared:
        return f"skipped, because the service has no record of any of its {len(packages)} packages"
    found = [
        f"  {package['name']} {package['version']}: {known['id']}, fixed in {', '.join(known['fix_versions']) or '-'}"
        for package in compared
        for known in package["vulns"]
    ]
    head = f"{len(found)} known vulnerabilities in {len(compared)} of {len(packages)} packages that were compared"
    return "\n".join([head, *found])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
