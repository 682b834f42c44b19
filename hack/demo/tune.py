"""Trains a fine-tune by the unmodified OpenAI client and asks it; prints the outcome as JSON.

Run in the Python environment, with an object of `url`, `api_key`, `namespace` and `model` on standard input. It
uploads the committed examples of one task, creates a job of a few steps, follows its events, and asks the base and the
new model the committed question of that task. Models and files of an earlier run are deleted first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from openai import APIError, OpenAI
from openai.types.fine_tuning import FineTuningJob

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run by path: hack/ holds the package

from demo.ask import AskError, ask  # noqa: E402  (needs the path above)
from demo.questions import QUESTIONS, Trained, questions  # noqa: E402

TASK = "routing"
SUFFIX = "demo"
METADATA = {"made_by": "demo"}
FILES = {"train.jsonl": 1, "heldout.jsonl": 4}
"""Every how many lines of each file one is uploaded; both are sorted by the answer."""
EXTRAS = {"rank": 8, "target_modules": ["q_proj", "v_proj"], "learning_rate": 1.5e-3, "max_steps": 18}
TIMEOUT_S = 600.0
POLL_S = 1.0
ENDED = ("succeeded", "failed", "cancelled")


class TuneError(Exception):
    """The job failed; the text says why."""


def remove_earlier(client: OpenAI) -> None:
    """Deletes what earlier runs made: models with their files, and the data sets."""
    models = {model.id for model in client.models.list()}
    files = {file.id for file in client.files.list(purpose="fine-tune")}
    for job in client.fine_tuning.jobs.list(metadata=METADATA):
        if job.status not in ENDED:
            client.fine_tuning.jobs.cancel(job.id)
        if job.fine_tuned_model in models:
            client.models.delete(job.fine_tuned_model)
        for file in files & {job.training_file, job.validation_file}:
            client.files.delete(file)


def create(client: OpenAI, model: str, folder: Path) -> FineTuningJob:
    """Uploads the examples and creates the job."""
    training, validation = (
        client.files.create(file=(name, _every(folder / name, step)), purpose="fine-tune").id
        for name, step in FILES.items()
    )
    return client.fine_tuning.jobs.create(
        model=model,
        training_file=training,
        validation_file=validation,
        suffix=SUFFIX,
        metadata=METADATA,
        seed=7,
        extra_body={"lorapool": EXTRAS},
    )


def _every(path: Path, step: int) -> bytes:
    with path.open("rb") as file:
        return b"".join(islice(file, 0, None, step))


def follow(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """Prints the job's events until it has ended. Raises TuneError."""
    deadline = time.monotonic() + TIMEOUT_S
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        for message in _unseen(client, job.id, seen):
            print(message, file=sys.stderr, flush=True)
        if job.status in ENDED:
            break
        if time.monotonic() > deadline:
            raise TuneError(f"{job.id} is still {job.status} after {TIMEOUT_S:.0f} s: `kubectl describe ftj {job.id}`")
        time.sleep(POLL_S)
    if job.fine_tuned_model is None:
        raise TuneError(f"{job.id} ended as {job.status}: {job.error.message if job.error else 'no reason was given'}")
    return job


def _unseen(client: OpenAI, job_id: str, seen: set[str]) -> Iterator[str]:
    events = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=100).data if event.id not in seen]
    seen.update(event.id for event in events)
    return (event.message for event in reversed(events))


def figures(client: OpenAI, job: FineTuningJob) -> dict[str, Any]:
    """The validation losses of the base (step 0) and of the last step that was measured, from the job's events."""
    measured = [
        event.data
        for event in client.fine_tuning.jobs.list_events(job.id, limit=100)
        if isinstance(event.data, dict) and event.data.get("full_valid_loss") is not None
    ]
    by_step = {int(data["step"]): float(data["full_valid_loss"]) for data in measured}
    return {"base_loss": by_step.get(0), "loss": by_step[max(by_step)] if by_step else None}


def tune(given: dict[str, str]) -> Trained:
    """Raises AskError, TuneError, openai.APIError."""
    client = OpenAI(
        base_url=given["url"], api_key=given["api_key"], organization=given["namespace"], timeout=120, max_retries=2
    )
    question = next(item for item in questions(given["namespace"]) if item.task == TASK)
    remove_earlier(client)
    started = time.monotonic()
    job = follow(client, create(client, given["model"], QUESTIONS.parent / TASK))
    seconds = time.monotonic() - started
    model = str(job.fine_tuned_model)
    return Trained(
        job=job.id,
        model=model,
        seconds=round(seconds, 1),
        trained_tokens=job.trained_tokens or 0,
        question=question.text,
        base_answer=ask(client, given["model"], question).text,
        answer=ask(client, model, question).text,
        **figures(client, job),
    )


def main() -> int:
    try:
        print(json.dumps(asdict(tune(json.load(sys.stdin)))))
    except (AskError, TuneError, APIError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
