"""Which jobs were computing when a trainer's process died, so that one that kills it does not do so for ever.

The file is written before each cycle and emptied at a regular end. What it names at a start was computed when the
process died. Only deaths at the same place of a job count together: a job that got further, or that was killed at
another place, begins at one again, so that evictions do not add up. A place is a job's `progress`, and a job whose
checkpoint is behind the place of its deaths got further, also where the process died before the file said so.
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

    place: int
    count: int


def after_death(known: Deaths | None, place: int) -> Deaths:
    """The count after a process died while it computed at this place."""
    return Deaths(place=place, count=known.count + 1 if known is not None and known.place == place else 1)


class Suspects:
    """The file in a trainer's folder, and the counts by job. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        """Reads what a process before this one left, and counts its death."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._computing, known = _read(self._path)
        self._deaths = known | {uid: after_death(known.get(uid), place) for uid, place in self._computing.items()}
        self._computing = {}
        self._write()

    def deaths(self, uid: str) -> int:
        found = self._deaths.get(uid)
        return found.count if found is not None else 0

    def computing(self, places: Mapping[str, int]) -> None:
        """Notes the jobs of the next cycle and the place of each, and forgets deaths at places that are passed."""
        self._deaths = {uid: deaths for uid, deaths in self._deaths.items() if places.get(uid, 0) <= deaths.place}
        if places != self._computing:
            self._computing = dict(places)
            self._write()

    def reached(self, uid: str, place: int) -> None:
        """Forgets deaths of a job at places before the one that its checkpoint continues from."""
        deaths = self._deaths.get(uid)
        if deaths is not None and deaths.place < place:
            self.forget(uid)

    def seed(self, uid: str, place: int, count: int) -> None:
        """Takes over what is known from an earlier trainer, for a job that continues at this place."""
        if count and uid not in self._deaths:
            self._deaths[uid] = Deaths(place=place, count=count)

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
