"""`python -m lorapool_artifacts inspect URI [--base URI] [--max-rank N]`: judges a source by hand.

For people who wonder why an adapter is refused: the same judgement as the operator's, with credentials from
this shell's environment. Prints one JSON object; exit status 0 fits, 1 does not fit, 2 cannot be read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import inspect_adapter, inspect_base
from lorapool_artifacts.settings import JudgeLimits, SourceSettings


async def _inspect(
    uri: str, base: str | None, max_rank: int, settings: SourceSettings
) -> tuple[int, dict[str, object]]:
    facts = (await inspect_base(base, None, settings)).facts if base else None
    seen = await inspect_adapter(uri, None, None, facts, JudgeLimits(max_rank=max_rank), settings)
    verdict = seen.verdict
    return (0 if verdict.ok else 1), {
        "ok": verdict.ok,
        "reason": verdict.reason.value if verdict.reason else None,
        "message": verdict.message,
        "revision": seen.revision,
        "digest": seen.digest,
        "rank": seen.rank,
        "targetModules": list(seen.target_modules),
        "sizeBytes": seen.size_bytes,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lorapool_artifacts")
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("uri", help="hf://, oci://, s3:// or pvc:// source of the adapter")
    parser.add_argument("--base", help="source of the base model it must fit")
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument("--pvc-root", type=Path, help="folder below which claims are mounted by name")
    given = parser.parse_args(arguments)
    settings = SourceSettings.from_env(os.environ).model_copy(update={"pvc_root": given.pvc_root})
    try:
        status, answer = asyncio.run(_inspect(given.uri, given.base, given.max_rank, settings))
    except ArtifactError as error:
        status, answer = 2, {"ok": False, "reason": error.reason.value, "message": error.message}
    print(json.dumps(answer, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
