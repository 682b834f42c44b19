"""`python -m lorapool_artifacts inspect URI [--base URI] [--max-rank N]`: checks a source from a shell.

It explains why an adapter is refused: it makes the operator's own check, with the credentials of the shell's
environment. The base's modules are known where the runtime is installed too; elsewhere the adapter is checked alone.
Prints one JSON object. Exit status: 0 compatible, 1 incompatible, 2 unreadable.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from lorapool_api.settings import SettingsError
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import inspect_adapter, inspect_base
from lorapool_artifacts.loaded_base import facts_of
from lorapool_artifacts.settings import AdapterLimits, SourceSettings


async def _inspect(
    uri: str, base: str | None, max_rank: int, settings: SourceSettings
) -> tuple[int, dict[str, object]]:
    facts = facts_of((await inspect_base(base, None, settings)).files) if base else None
    found = await inspect_adapter(uri, None, None, facts, AdapterLimits(max_rank=max_rank), settings)
    result = found.compatibility
    return (0 if result.ok else 1), {
        "ok": result.ok,
        "reason": result.reason.value if result.reason else None,
        "message": result.message,
        "revision": found.revision,
        "digest": found.digest,
        "rank": found.rank,
        "targetModules": list(found.target_modules),
        "sizeBytes": found.size_bytes,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lorapool_artifacts")
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("uri", help="hf://, oci://, s3:// or pvc:// source of the adapter")
    parser.add_argument("--base", help="source of the base model it must fit")
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument("--pvc-root", type=Path, help="folder in which claims are mounted by name")
    given = parser.parse_args(arguments)
    try:
        settings = SourceSettings.from_env(os.environ, pvc_root=given.pvc_root)
        status, report = asyncio.run(_inspect(given.uri, given.base, given.max_rank, settings))
    except ArtifactError as error:
        status, report = 2, {"ok": False, "reason": error.reason.value, "message": error.message}
    except SettingsError as error:
        error.report("lorapool-artifacts")
        return 2
    print(json.dumps(report, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
