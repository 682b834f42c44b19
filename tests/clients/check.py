"""Runs one check after the other and prints a line of JSON for each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

BASE = os.environ["LP_BASE"]
KEY = os.environ["LP_KEY"]
MODEL = "demo/tiny"


def check(name: str, run: Callable[[], object]) -> None:
    try:
        result = run()
        print(
            json.dumps({"name": name, "ok": result is None or bool(result), "error": f"gave {result!r}"[:500]}),
            flush=True,
        )
    except Exception as error:  # whatever a client raises
        print(json.dumps({"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}), flush=True)


def raises(kind: type[BaseException], run: Callable[[], object]) -> bool:
    try:
        run()
    except kind:
        return True
    return False
