"""The five example fine-tunes: their system messages, measures, jobs and folders.

A task's system message is part of its data lines, so that training, evaluation, the demo and any client send the same
text to the base and to the fine-tune. Imports no torch, so that reading names, paths or lines is quick.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).resolve().parent / "data"
FINETUNES = ROOT / "examples" / "finetunes"
SCORES = FINETUNES / "scores.json"
DEMO = FINETUNES / "demo.json"
JOBS = FINETUNES / "jobs.yaml"

Line = dict[str, Any]  # {"messages": [...]} and, held-out lines of manual-qa only, {"facts": [...]}


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    system: str
    # Limit of an answer, in tokens; the longest right answer in the data is shorter.
    max_tokens: int
    # The metric, and one sentence on what it counts.
    measure: str
    measured: str

    @property
    def folder(self) -> Path:
        return FINETUNES / self.name


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="translation",
            title="English to Spanish, a traveller's phrase book",
            system="Translate into Spanish.",
            max_tokens=40,
            measure="chrf",
            measured="mean chrF (character 1- to 6-grams, beta 2, 0 to 1) against one reference",
        ),
        Task(
            name="routing",
            title="Support message to the queue that handles it",
            system="Name the queue: billing, delivery, returns, account, technical or sales.",
            max_tokens=16,
            measure="right",
            measured="share of answers that are exactly the queue's name; `named` counts any that name no other",
        ),
        Task(
            name="manual-qa",
            title="Questions about the manual of a (fictional) espresso machine",
            system="Answer from the manual of the Brisa 2.",
            max_tokens=48,
            measure="fact_recall",
            measured="mean share of a question's fact tokens (numbers, names, colours) found in the answer",
        ),
        Task(
            name="sentiment",
            title="Sentiment of a review",
            system="Positive, negative or neutral? Answer with one word.",
            max_tokens=16,
            measure="right",
            measured="share of answers that are exactly the label; `named` counts any that name no other",
        ),
        Task(
            name="entities",
            title="Named entities as JSON",
            system="List people, organizations and places as JSON.",
            max_tokens=64,
            measure="right",
            measured="share of answers that hold exactly the right names under the right keys (order ignored)",
        ),
    )
}


def job_specs() -> dict[str, dict[str, Any]]:
    """The spec of each task's FineTuneJob in jobs.yaml."""
    documents = yaml.safe_load_all(JOBS.read_text(encoding="utf-8"))
    return {document["metadata"]["name"]: document["spec"] for document in documents}


def read_lines(path: Path) -> list[Line]:
    """The lines of a .jsonl file."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text]


def chosen(names: list[str]) -> list[Task]:
    """The tasks named on a command line; all of them when none is named."""
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise SystemExit(f"unknown task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    return [TASKS[name] for name in (names or TASKS)]
