"""Bounds how long work in many small pieces keeps the event loop from anything else."""

from __future__ import annotations

import asyncio
import time

SLICE_S = 0.01
"""Work takes this long, and one piece more, in one pass of the event loop; then the Lease and the probes come."""


class Slices:
    """Belongs to one event loop, and bounds all work that takes turns in it together."""

    def __init__(self) -> None:
        self._ends_s: float | None = None

    async def turn(self) -> None:
        """Returns in a pass of the event loop that has time left for one more piece of work."""
        while self._ends_s is not None and time.monotonic() > self._ends_s:  # noqa: ASYNC110  the pass has no event
            await asyncio.sleep(0)
        if self._ends_s is None:
            self._ends_s = time.monotonic() + SLICE_S
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        self._ends_s = None
