"""Compares the locked dependencies of both images with published advisories, by pip-audit.

Exit status: 0 nothing is known, or no advisories can be reached, which is reported; 1 a locked version is vulnerable.
Arguments go to pip-audit, such as `--vulnerability-service osv --osv-url URL` for a mirror in a closed network.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements-control.lock", "requirements-runtime.lock")
FOUND = 1
UNREACHABLE = ("ConnectionError", "Max retries exceeded", "ServiceError", "Could not connect", "timed out")


def main(arguments: list[str]) -> int:
    worst = 0
    for lock in LOCKS:
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "-r", str(ROOT / lock)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode and any(words in done.stderr for words in UNREACHABLE):
            print(f"{lock}: skipped, because no advisories can be reached: {done.stderr.strip().splitlines()[-1]}")
            continue
        print(f"{lock}: {(done.stdout + done.stderr).strip()}")
        worst = max(worst, done.returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
