"""Events and checkpoints of a job, in the form and order of OpenAI's API.

The trainer writes events as JSON lines in numbered parts. Creation and end, which the object shows, are
added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lorapool_api.common import ApiModel
from lorapool_gateway.routing.objects import unix_s
from lorapool_gateway.tuning.job_object import Job
from lorapool_gateway.tuning.pages import limit_of, listed, page
from lorapool_gateway.tuning.store_client import ObjectNotFoundError, StoreClient

MAX_LIMIT = 1000


class Event(ApiModel):
    """One line of a part."""

    id: str
    created_at: float
    level: str = "info"
    message: str = ""
    type: str = "message"
    data: dict[str, Any] | None = None

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "fine_tuning.job.event",
            "created_at": int(self.created_at),
            "level": self.level if self.level in ("info", "warn", "error") else "info",
            "message": self.message,
            "type": self.type if self.type in ("message", "metrics") else "message",
            "data": self.data or {},
        }


async def events(store: StoreClient, job: Job, query: Mapping[str, str]) -> dict[str, Any]:
    """One page of a job's events, the newest first. Reads no older parts than it needs."""
    limit, after = limit_of(query, default=20, most=MAX_LIMIT), query.get("after")
    found = _end_of(job)
    parts = await store.list(job.ref.namespace, f"jobs/{job.uid}/events/")
    for part in reversed(parts):
        if len(_behind(found, after)) > limit:
            break
        found += reversed(await _read(store, job, part.key))
    else:
        found.append(_beginning_of(job))
    shown, more = page(
        [event.shown() for event in found], query, lambda item: str(item["id"]), default=20, most=MAX_LIMIT
    )
    return listed(shown, more)


def _behind(found: list[Event], after: str | None) -> list[Event]:
    """The events behind `after`; none until it was found."""
    if not after:
        return found
    return next((found[number + 1 :] for number, item in enumerate(found) if item.id == after), [])


async def _read(store: StoreClient, job: Job, key: str) -> list[Event]:
    """The events of one part, the oldest first; a line that is none is left out."""
    try:
        text = await store.get(job.ref.namespace, key)
    except ObjectNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(Event.model_validate(json.loads(line)))
        except ValueError:
            continue
    return found


def _beginning_of(job: Job) -> Event:
    return Event(
        id=_id("ftevent-", job, "created"), created_at=job.created_unix_s, message=f"Created fine-tuning job: {job.id}"
    )


def _end_of(job: Job) -> list[Event]:
    """How the job has ended, which only its object says for jobs that never had a trainer."""
    finished = job.status.finished_at
    if finished is None or not job.ended:
        return []
    level, message = "info", f"The job has ended: {job.shown_state}."
    if job.shown_state == "failed":
        level, message = "error", job.status.failure.message if job.status.failure is not None else "The job failed."
    elif job.status.result is not None and job.status.result.model:
        message = f"New fine-tuned model created: {job.status.result.model}"
    return [Event(id=_id("ftevent-", job, "ended"), created_at=unix_s(finished), level=level, message=message)]


def checkpoints(job: Job, query: Mapping[str, str]) -> dict[str, Any]:
    """One page of a job's checkpoints, the newest first.

    `fine_tuned_model_checkpoint` is the job's model for the step that the model was made of, and otherwise a name for
    the record alone: checkpoints are kept to continue training, not to be served.
    """
    status = job.status
    best = status.metrics.best_step if status.metrics is not None else None
    model = status.result.model if status.result is not None else None
    found = []
    for item in reversed(status.checkpoints):
        losses = {"step": item.step, "train_loss": item.train_loss, "full_valid_loss": item.valid_loss}
        found.append(
            {
                "id": _id("ftckpt_", job, str(item.step)),
                "object": "fine_tuning.job.checkpoint",
                "created_at": int(unix_s(item.at)),
                "fine_tuned_model_checkpoint": model
                if model and item.step == best
                else f"{job.id}:ckpt-step-{item.step}",
                "fine_tuning_job_id": job.id,
                "metrics": {name: value for name, value in losses.items() if value is not None},
                "step_number": item.step,
            }
        )
    shown, more = page(found, query, lambda item: str(item["id"]), default=10, most=MAX_LIMIT)
    return listed(shown, more)


def _id(prefix: str, job: Job, what: str) -> str:
    return prefix + hashlib.sha256(f"{job.uid}/{what}".encode()).hexdigest()[:24]
