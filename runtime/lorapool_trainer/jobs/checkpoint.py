"""Checkpoints: everything from which a job continues bit for bit, in a folder that is named by its content.

`checkpoints/<step>-<digest>/` holds `state.safetensors`, the matrices and the moments of AdamW, and `checkpoint.json`,
the rest with the hash of the tensors; the digest is of this file. A folder is written elsewhere and renamed, so one
that exists is whole; one whose content does not fit its name is passed over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lorapool_trainer.engine import JobSettings, JobState
from lorapool_trainer.jobs.history import Row
from lorapool_trainer.jobs.validation import Best

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE_FILE, RECORD_FILE = "state.safetensors", "checkpoint.json"
FORMAT = 1


class CheckpointMismatchError(Exception):
    """The checkpoints belong to other settings or other files; the message says which."""


class BaseChangedError(CheckpointMismatchError):
    """The checkpoints belong to other files of the base."""


class Origin(BaseModel):
    """What the result is a function of."""

    model_config = ConfigDict(frozen=True)

    base: str
    settings: dict[str, object]
    data: str
    """Digests of the files, that of the continued adapter included, and the number of training examples."""
    numerics: str

    @classmethod
    def of(cls, base: str, settings: JobSettings, data: str, numerics: str) -> Origin:
        values = asdict(settings)
        modules = values["target_modules"]
        values["target_modules"] = modules if isinstance(modules, str) else list(modules)
        return cls(base=base, settings=values, data=data, numerics=numerics)


class Counters(BaseModel):
    """What is counted and measured besides the engine's own state."""

    model_config = ConfigDict(frozen=True)

    trained_tokens: int = 0
    """Tokens of finished steps."""
    computed_tokens: int = 0
    trainer_seconds: float = 0.0
    restarts: int = 0
    broken: int = 0
    """Broken steps in a row."""
    base_loss: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    best: Best = Best()


class Record(BaseModel):
    """The content of `checkpoint.json`."""

    model_config = ConfigDict(frozen=True)

    version: int = FORMAT
    origin: Origin
    step: int
    updates: int
    skipped_steps: int
    consecutive_skips: int
    trained_tokens: int
    state_sha256: str
    written_unix_s: float
    counters: Counters
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    record: Record

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.path.name}"

    @property
    def digest(self) -> str:
        return f"sha256:{_record_hash(self.record)}"

    def state(self) -> JobState:
        """Reads the tensors. Raises ValueError if they are not those that were written."""
        raw = (self.path / STATE_FILE).read_bytes()
        if hashlib.sha256(raw).hexdigest() != self.record.state_sha256:
            raise ValueError(f"{self.path}: {STATE_FILE} was changed after it was written")
        kept = self.record
        return JobState(
            tensors=safetensors.torch.load(raw),
            step=kept.step,
            updates=kept.updates,
            skipped_steps=kept.skipped_steps,
            consecutive_skips=kept.consecutive_skips,
            trained_tokens=kept.trained_tokens,
        )


def write_checkpoint(
    folder: Path, origin: Origin, state: JobState, counters: Counters, rows: list[Row], now_unix_s: float
) -> Checkpoint:
    """Writes below the job's folder, and waits until the disk has it. Raises OSError."""
    raw = safetensors.torch.save(dict(state.tensors), metadata={"format": "pt"})
    record = Record(
        origin=origin,
        step=state.step,
        updates=state.updates,
        skipped_steps=state.skipped_steps,
        consecutive_skips=state.consecutive_skips,
        trained_tokens=state.trained_tokens,
        state_sha256=hashlib.sha256(raw).hexdigest(),
        written_unix_s=now_unix_s,
        counters=counters,
        rows=tuple(rows),
    )
    path = folder / FOLDER / f"{state.step:08d}-{_record_hash(record)[:16]}"
    write_folder(path, {STATE_FILE: raw, RECORD_FILE: record.model_dump_json().encode()})
    return Checkpoint(path, record)


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """The whole checkpoints below a job's folder, the one of the most steps last."""
    return sorted(_readable(folder / FOLDER), key=lambda found: (found.record.step, found.record.written_unix_s))


def check_origin(checkpoint: Checkpoint, origin: Origin) -> None:
    """Raises CheckpointMismatchError where the job is not the one that was interrupted, BaseChangedError where its
    base is not."""
    found = checkpoint.record.origin
    changed = [name for name in Origin.model_fields if getattr(found, name) != getattr(origin, name)]
    if "base" in changed:
        raise BaseChangedError(
            f"The base's files were {found.base} when the job began and are {origin.base} now, so that its checkpoints "
            f"in {checkpoint.path.parent} are of no use. Restore the files, or create the job again."
        )
    if "settings" in changed:
        keys = origin.settings.keys() | found.settings.keys()
        own = sorted(key for key in keys if origin.settings.get(key) != found.settings.get(key))
        changed[changed.index("settings")] = f"settings ({', '.join(own)})"
    if "data" in changed:
        changed[changed.index("data")] = "data or the adapter of initFrom"
    if changed:
        raise CheckpointMismatchError(
            f"{checkpoint.path.parent} holds checkpoints of another job: {', '.join(changed)} changed since. Delete "
            "that folder to begin again, or restore what was changed to continue."
        )


def superseded(checkpoints: list[Checkpoint], keep: int, best_step: int | None) -> list[Checkpoint]:
    """Those that are neither among the newest `keep` nor of the best step."""
    return [found for found in checkpoints[:-keep] if found.record.step != best_step]


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Makes a folder with these files appear at once, in place of one of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.parent / f".writing-{path.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for name, content in files.items():
        with (writing / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(path, ignore_errors=True)
    writing.rename(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _readable(folder: Path) -> Iterator[Checkpoint]:
    for path in folder.glob("[0-9]*-*"):
        try:
            found = Checkpoint(path, Record.model_validate_json((path / RECORD_FILE).read_bytes()))
        except (OSError, ValidationError):
            found = None
        if found is not None and path.name.endswith(_record_hash(found.record)[:16]) and _is_whole(found):
            yield found
        else:
            log.warning("a damaged checkpoint is passed over", extra={"folder": str(path)})


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        with (checkpoint.path / STATE_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == checkpoint.record.state_sha256
    except OSError:
        return False


def _record_hash(record: Record) -> str:
    return hashlib.sha256(record.model_dump_json().encode()).hexdigest()
