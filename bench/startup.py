"""How long the runtime takes from process start to ready, against `from_pretrained` in a minimal script, alternating.

    python bench/startup.py [--rounds 3] [--records PATH]

Both are new processes with the weights on disk (in the page cache after the first round); both include their imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common.places import ROOT, VOLUMES, base_folder
from common.records import COUNTED_ROUNDS, against, alternate, parsed, parser, report, timed
from engines.standalone import Standalone

BARE = (
    "import sys, torch; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T;"
    "A.from_pretrained(sys.argv[1], dtype=torch.float32); T.from_pretrained(sys.argv[1])"
)


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=COUNTED_ROUNDS)
    given = parsed(asked)
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "runtime"))
    base = base_folder()
    VOLUMES.mkdir(parents=True, exist_ok=True)

    def minimal() -> float:
        command = [sys.executable, "-c", BARE, str(base)]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    def ours() -> float:
        with tempfile.TemporaryDirectory() as cache:
            servers: list[Standalone] = []

            def to_ready() -> None:
                servers.append(Standalone(base, VOLUMES, Path(cache), {"dtype": "float32"}, "start"))
                servers[0].wait_until_ready()

            try:
                return timed(to_ready)
            finally:
                for server in servers:
                    server.__exit__(None, None, None)

    runs = alternate({"ours": ours, "minimal": minimal}, given.rounds)
    records = [against("start.ready_over_from_pretrained", "s", runs["ours"], "from_pretrained", runs["minimal"])]
    report(records, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
