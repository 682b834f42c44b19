"""The version of Lorapool that runs."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version


@functools.cache  # reads files
def release() -> str:
    """The installed version; "unknown" for a source tree that is not installed."""
    try:
        return version("lorapool")
    except PackageNotFoundError:
        return "unknown"
