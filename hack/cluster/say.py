"""Progress for people, on standard error, so that standard output stays one JSON object or nothing."""

import sys
import time

_START = time.monotonic()


def say(text: str) -> None:
    """One line, with the seconds since the command began."""
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)
