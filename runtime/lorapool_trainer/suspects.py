"""Which jobs were computing when a trainer's process died, so that one that kills it does not do so for ever.

The file is written before each cycle and removed at a regular end. What it names at a start was computed when the
process died. Only deaths at the same step of a job count together: a job that got further, or that was killed at
another step, begins at one again, so that evictions do not add up.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

FILE = "computing.json"
ALONE_AFTER = 2
"""A job that was computing in so many deaths is computed without others, to find out whether it is the cause."""


class Deaths(BaseModel):
    """Of one job."""

    model_config = ConfigDict(frozen=True)

    step: int
    count: int


def after_death(known: Deaths | None, step: int) -> Deaths:
    """The count after a process died while it computed this step."""
    return Deaths(step=step, count=known.count + 1 if known is not None and known.step == step else 1)


class Suspects:
    """The file in a trainer's folder, and the counts by job. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        """Reads what a process before this one left, and counts its death."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._computing, known = _read(self._path)
        self._deaths = known | {uid: after_death(known.get(uid), step) for uid, step in self._computing.items()}
        self._computing = {}
        self._write()

    def deaths(self, uid: str) -> int:
        found = self._deaths.get(uid)
        return found.count if found is not None else 0

    def computing(self, steps: Mapping[str, int]) -> None:
        """Notes the jobs of the next cycle and the step of each, and forgets deaths at steps that are done."""
        self._deaths = {uid: deaths for uid, deaths in self._deaths.items() if steps.get(uid, 0) <= deaths.step}
        if steps != self._computing:
            self._computing = dict(steps)
            self._write()

    def seed(self, uid: str, step: int, count: int) -> None:
        """Takes over what is known from an earlier trainer, for a job that continues at this step."""
        if count and uid not in self._deaths:
            self._deaths[uid] = Deaths(step=step, count=count)

    def forget(self, uid: str) -> None:
        self._deaths.pop(uid, None)

    def close(self) -> None:
        """Called at a regular end: nothing is computing."""
        self._computing = {}
        self._write()

    def _write(self) -> None:
        """Renamed into place, without waiting for the disk: it must outlive this process, not the machine."""
        counts = {uid: deaths.model_dump() for uid, deaths in self._deaths.items()}
        own = self._path.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps({"computing": self._computing, "deaths": counts}))
        own.replace(self._path)


def _read(path: Path) -> tuple[dict[str, int], dict[str, Deaths]]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json.loads(path.read_text())
        return found["computing"], {uid: Deaths(**deaths) for uid, deaths in found["deaths"].items()}
    return {}, {}
