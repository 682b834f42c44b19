"""One question for each fine-tune, to the base and to the fine-tune, with an unmodified OpenAI client.

Called by `run`. The first call to a parked fine-tune is its cold time (the load is in it), the second its warm time.
Refuses to report an answer whose `x-lorapool-adapter` header is not the adapter that was asked.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai import APIStatusError, OpenAI

from demo.steps import StepError

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
    """One line of the table and of summary.json."""

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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def questions(namespace: str) -> list[Question]:
    """The committed questions; adapters are named after their task."""
    return [
        Question(item["task"], f"{namespace}/{item['task']}", item["messages"], int(item.get("max_tokens", 64)))
        for item in json.loads(QUESTIONS.read_text())
    ]


def ask_all(client: OpenAI, base: str, asked: list[Question]) -> list[Answer]:
    """Base first (it may have to start), then each fine-tune twice. Raises StepError for a wrong or failed answer."""
    plain = {question.task: _ask(client, base, question) for question in asked}
    answers = []
    for question in asked:
        cold = _ask(client, question.adapter, question)
        warm = _ask(client, question.adapter, question)
        if not cold.header.startswith(f"{question.adapter}@sha256:") or warm.header != cold.header:
            raise StepError(
                f"{question.adapter} answered as '{cold.header}', then as '{warm.header}': please report it"
            )
        answers.append(
            Answer(
                task=question.task,
                adapter=question.adapter,
                header=cold.header,
                question=question.text,
                base_answer=plain[question.task].text,
                answer=cold.text,
                prompt_tokens=cold.prompt_tokens,
                completion_tokens=cold.completion_tokens,
                cold_s=round(cold.seconds, 3),
                warm_s=round(warm.seconds, 3),
            )
        )
        print(f"      {question.task}: cold {cold.seconds:.2f} s, warm {warm.seconds:.2f} s", flush=True)
    return answers


@dataclass(frozen=True)
class _Reply:
    text: str
    header: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def _ask(client: OpenAI, model: str, question: Question) -> _Reply:
    started = time.monotonic()
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=model,
            messages=question.messages,  # type: ignore[arg-type]
            max_tokens=question.max_tokens,
            temperature=0,
        )
    except APIStatusError as error:
        raise StepError(
            f"{model} answered {error.status_code}: {error.message}\n"
            "`kubectl describe lora` and the logs of gateway and runtime say more."
        ) from error
    seconds = time.monotonic() - started
    reply = raw.parse()
    assert reply.usage is not None
    return _Reply(
        text=(reply.choices[0].message.content or "").strip(),
        header=raw.headers.get("x-lorapool-adapter", ""),
        prompt_tokens=reply.usage.prompt_tokens,
        completion_tokens=reply.usage.completion_tokens,
        seconds=seconds,
    )
