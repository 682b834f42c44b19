"""The events of a job, as OpenAI's clients list them: what happened, and the figures of steps. Pure.

They are stored in immutable parts, oldest first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorapool_api.tuning.states import JobState
from lorapool_trainer.jobs.history import Row
from lorapool_trainer.jobs.live import LiveJob

PART_LINES, PART_S = 200, 10.0
_SAID = {
    JobState.QUEUED: "The files are valid; the job waits for its turn",
    JobState.TRAINING: "Training started",
    JobState.PAUSED: "The job was paused",
    JobState.SUCCEEDED: "The job was completed; the adapter is stored",
    JobState.CANCELLED: "The job was cancelled",
}


@dataclass
class EventLog:
    """Of one job: what was reported, and the lines that are not stored yet."""

    uid: str
    number: int = 0
    """Of the next event; ids are unique in a job."""
    state: JobState | None = None
    rows: int = 0
    lines: list[str] = field(default_factory=list)
    since_s: float = 0.0

    def observe(self, job: LiveJob, now_unix_s: float) -> None:
        """Adds lines for a state that is new and for steps that are complete: made, and measured where that is due."""
        if not job.state.ended:
            self._observe_state(job, now_unix_s)
        complete = job.complete_rows
        self.rows = max(self.rows, job.restored_rows)  # an earlier trainer reported these
        for row in complete[self.rows :]:
            self._add(_metrics(row, job.loaded.steps if job.loaded else row.step), now_unix_s)
        self.rows = max(self.rows, len(complete))
        if job.state.ended:
            self._observe_state(job, now_unix_s)

    def _observe_state(self, job: LiveJob, now_unix_s: float) -> None:
        if job.state is not self.state:
            self.state = job.state
            self._say(_message(job), now_unix_s, level="error" if job.failure else "info")

    def part(self, now_s: float, *, ended: bool) -> str | None:
        """The lines of the next part when it is time to store it; they stay until `stored` is called."""
        due = ended or len(self.lines) >= PART_LINES or now_s - self.since_s >= PART_S
        return "".join(self.lines) if self.lines and due else None

    def stored(self, now_s: float) -> None:
        self.lines, self.since_s = [], now_s

    def _say(self, message: str | None, now_unix_s: float, *, level: str) -> None:
        if message is not None:
            self._add({"level": level, "message": message, "type": "message", "data": {}}, now_unix_s)

    def _add(self, event: dict[str, Any], now_unix_s: float) -> None:
        self.number += 1
        head = {"id": f"ftevent-{self.uid}-{self.number}", "created_at": int(now_unix_s)}
        self.lines.append(json.dumps({**head, **event}) + "\n")


def _message(job: LiveJob) -> str | None:
    return job.failure.message if job.failure is not None else _SAID.get(job.state)


def _metrics(row: Row, steps: int) -> dict[str, Any]:
    named = {
        "train_loss": row.train_loss,
        "train_mean_token_accuracy": row.train_accuracy,
        "valid_loss": row.valid_loss,
        "valid_mean_token_accuracy": row.valid_accuracy,
        "full_valid_loss": row.valid_loss,  # a measurement is always of all validation examples
        "full_valid_mean_token_accuracy": row.valid_accuracy,
    }
    data = {
        "step": row.step,
        "total_steps": steps,
        **{name: value for name, value in named.items() if value is not None},
    }
    losses = ", ".join(f"{said} loss={value:.3f}" for said, value in _losses(row))
    return {"level": "info", "message": f"Step {row.step}/{steps}: {losses}", "type": "metrics", "data": data}


def _losses(row: Row) -> Iterable[tuple[str, float]]:
    return [
        (said, value)
        for said, value in (("training", row.train_loss), ("validation", row.valid_loss))
        if value is not None
    ]
