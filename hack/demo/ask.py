"""Asks base and fine-tunes the committed questions with an unmodified OpenAI client; prints the answers as JSON.

Run in the Python environment, with an object of `url`, `api_key`, `namespace` and `base` on standard input. The first
call to an unloaded fine-tune is its cold time (which includes the load), the second its warm time. An answer whose
`x-lorapool-adapter` header does not name the adapter that was asked is an error.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import APIStatusError, OpenAI

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run by path: hack/ holds the package

from demo.questions import Answer, Question, questions  # noqa: E402  (needs the path above)

TIMEOUT_S = 400


class AskError(Exception):
    """A wrong or failed answer; the text says why."""


@dataclass(frozen=True)
class Reply:
    text: str
    header: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def ask_all(client: OpenAI, base: str, asked: list[Question]) -> list[Answer]:
    """Asks the base first (it may have to start), then each fine-tune twice. Raises AskError."""
    of_base = {question.task: ask(client, base, question) for question in asked}
    answers = []
    for question in asked:
        cold = ask(client, question.adapter, question)
        warm = ask(client, question.adapter, question)
        if not cold.header.startswith(f"{question.adapter}@sha256:") or warm.header != cold.header:
            raise AskError(f"{question.adapter} answered as '{cold.header}', then as '{warm.header}': please report it")
        answers.append(
            Answer(
                task=question.task,
                adapter=question.adapter,
                header=cold.header,
                question=question.text,
                base_answer=of_base[question.task].text,
                answer=cold.text,
                prompt_tokens=cold.prompt_tokens,
                completion_tokens=cold.completion_tokens,
                cold_s=round(cold.seconds, 3),
                warm_s=round(warm.seconds, 3),
            )
        )
        print(f"{question.task}: cold {cold.seconds:.2f} s, warm {warm.seconds:.2f} s", file=sys.stderr, flush=True)
    return answers


def ask(client: OpenAI, model: str, question: Question) -> Reply:
    """One chat completion at temperature 0. Raises AskError."""
    started = time.monotonic()
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=model,
            messages=question.messages,  # type: ignore[arg-type]
            max_tokens=question.max_tokens,
            temperature=0,
        )
    except APIStatusError as error:
        raise AskError(
            f"{model} answered {error.status_code}: {error.message}\n"
            "`kubectl describe lora` and the logs of gateway and runtime say more."
        ) from error
    seconds = time.monotonic() - started
    reply = raw.parse()
    assert reply.usage is not None
    return Reply(
        text=(reply.choices[0].message.content or "").strip(),
        header=raw.headers.get("x-lorapool-adapter", ""),
        prompt_tokens=reply.usage.prompt_tokens,
        completion_tokens=reply.usage.completion_tokens,
        seconds=seconds,
    )


def main() -> int:
    given = json.load(sys.stdin)
    client = OpenAI(base_url=given["url"], api_key=given["api_key"], timeout=TIMEOUT_S, max_retries=0)
    try:
        answers = ask_all(client, f"{given['namespace']}/{given['base']}", questions(given["namespace"]))
    except AskError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps([asdict(answer) for answer in answers]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
