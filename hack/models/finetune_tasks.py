"""The five example fine-tunes: their system messages, training settings and folders.

A task's system message is part of its data lines, so that training, evaluation, the demo and any client send the same
text to the base and to the fine-tune. Imports no torch, so that reading names, paths or lines is quick.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).resolve().parent / "data"
FINETUNES = ROOT / "examples" / "finetunes"
SCORES = FINETUNES / "scores.json"
DEMO = FINETUNES / "demo.json"
SEED = 20240
LAYERS = 30

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Line = dict[str, Any]  # {"messages": [...]} and, held-out lines of manual-qa only, {"facts": [...]}


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    system: str
    rank: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float
    # Limit of an answer, in tokens; the longest right answer in the data is shorter.
    max_tokens: int
    # The metric, and one sentence on what it counts.
    measure: str
    measured: str

    # The lowest layer that is trained. The layers below it are computed once per line.
    first_layer: int = 0

    @property
    def layers(self) -> list[int] | None:
        """peft's `layers_to_transform`: None is all of them."""
        return list(range(self.first_layer, LAYERS)) if self.first_layer else None

    @property
    def reach(self) -> str:
        modules = ", ".join(self.targets)
        return f"{modules} of layers {self.first_layer} to {LAYERS - 1}" if self.first_layer else modules

    @property
    def folder(self) -> Path:
        return FINETUNES / self.name

    @property
    def alpha(self) -> int:
        return 2 * self.rank


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="translation",
            title="English to Spanish, a traveller's phrase book",
            system="Translate into Spanish.",
            rank=8,
            targets=ATTENTION + MLP,
            steps=260,
            learning_rate=1.5e-3,
            max_tokens=40,
            measure="chrf",
            measured="mean chrF (character 1- to 6-grams, beta 2, 0 to 1) against one reference",
            first_layer=4,
        ),
        Task(
            name="routing",
            title="Support message to the queue that handles it",
            system="Name the queue: billing, delivery, returns, account, technical or sales.",
            rank=8,
            targets=("q_proj", "v_proj"),
            steps=100,
            learning_rate=1.5e-3,
            max_tokens=16,
            measure="right",
            measured="share of answers that are exactly the queue's name; `named` counts any that name no other",
        ),
        Task(
            name="manual-qa",
            title="Questions about the manual of a (fictional) espresso machine",
            system="Answer from the manual of the Brisa 2.",
            rank=16,
            targets=("o_proj", "down_proj"),
            steps=240,
            learning_rate=1.5e-3,
            max_tokens=48,
            measure="fact_recall",
            measured="mean share of a question's fact tokens (numbers, names, colours) found in the answer",
            first_layer=10,
        ),
        Task(
            name="sentiment",
            title="Sentiment of a review",
            system="Positive, negative or neutral? Answer with one word.",
            rank=4,
            targets=("q_proj", "v_proj", "o_proj"),
            steps=80,
            learning_rate=1.5e-3,
            max_tokens=16,
            measure="right",
            measured="share of answers that are exactly the label; `named` counts any that name no other",
        ),
        Task(
            name="entities",
            title="Named entities as JSON",
            system="List people, organizations and places as JSON.",
            rank=8,
            targets=("q_proj", "v_proj", "o_proj"),
            steps=150,
            learning_rate=1.5e-3,
            max_tokens=64,
            measure="right",
            measured="share of answers that hold exactly the right names under the right keys (order ignored)",
            first_layer=15,
        ),
    )
}


def read_lines(path: Path) -> list[Line]:
    """The lines of a .jsonl file."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text]


def chosen(names: list[str]) -> list[Task]:
    """The tasks named on a command line; all of them when none is named."""
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise SystemExit(f"unknown task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    return [TASKS[name] for name in (names or TASKS)]
