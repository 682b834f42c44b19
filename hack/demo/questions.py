"""The committed questions to each fine-tune, and what was answered. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = Path(__file__).resolve().parents[2] / "examples" / "finetunes" / "demo.json"


@dataclass(frozen=True)
class Question:
    task: str
    adapter: str
    messages: list[dict[str, str]]
    max_tokens: int

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Answer:
    """One row of the table and of summary.json. Times in seconds."""

    task: str
    adapter: str
    header: str
    question: str
    base_answer: str
    answer: str
    prompt_tokens: int
    completion_tokens: int
    cold_s: float
    warm_s: float


@dataclass(frozen=True)
class BillLine:
    """What one model has used and costs, for the end of the report and summary.json."""

    model: str
    requests: int
    input_tokens: int
    """Cached ones included."""
    cached_tokens: int
    output_tokens: int
    amount: str
    """As exact as the ledger has it."""
    currency: str


@dataclass(frozen=True)
class Trained:
    """The fine-tune that was trained here, for the end of the report and summary.json. Losses on the held-out lines."""

    job: str
    model: str
    seconds: float
    trained_tokens: int
    base_loss: float | None
    loss: float | None
    question: str
    base_answer: str
    answer: str


def questions(namespace: str) -> list[Question]:
    """The committed questions; adapters are named after their task."""
    return [
        Question(item["task"], f"{namespace}/{item['task']}", item["messages"], int(item.get("max_tokens", 64)))
        for item in json.loads(QUESTIONS.read_text())
    ]
