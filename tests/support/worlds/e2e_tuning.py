"""Fine-tuning by the unmodified client on the running demo: data sets, jobs, and losses as the gateway sees them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from e2e_world import BASE, ROOT, World
from lm_eval_kit import real_base
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from transformers import AutoTokenizer

Line = dict[str, Any]
ENDED = ("succeeded", "failed", "cancelled")


def lines_of(task: str, part: str, every: int = 1) -> list[Line]:
    """One of every `every` lines of a committed data set, `train` or `heldout`; some are sorted by the answer."""
    text = (ROOT / "examples" / "finetunes" / task / f"{part}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()[::every]]


def with_shuffled_answers(lines: Sequence[Line]) -> list[Line]:
    """Each question with the answer of any line."""
    answers = [line["messages"][-1] for line in lines]
    random.Random(7).shuffle(answers)
    return [{"messages": [*line["messages"][:-1], answer]} for line, answer in zip(lines, answers, strict=True)]


@dataclass
class Tuning:
    """Acts for one tenant."""

    world: World
    client: OpenAI

    @property
    def base(self) -> str:
        return self.world.model(BASE)

    def upload(self, lines: Sequence[Line]) -> str:
        """Returns the id of the file."""
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        return self.client.files.create(file=("data.jsonl", content), purpose="fine-tune").id

    def create(self, training: str, validation: str | None, suffix: str, **extras: Any) -> FineTuningJob:
        return self.client.fine_tuning.jobs.create(
            model=self.base,
            training_file=training,
            validation_file=validation,
            suffix=suffix,
            seed=7,
            extra_body={"lorapool": {"learning_rate": 1.5e-3, **extras}},
        )

    def state(self, job: FineTuningJob) -> str:
        return str(self.status(job).get("state"))

    def status(self, job: FineTuningJob) -> dict[str, Any]:
        return dict(self.world.get("ftj", job.id).get("status", {}))

    def ended(self, job: FineTuningJob, timeout_s: float) -> FineTuningJob:
        self.world.wait(
            f"the end of {job.id}",
            lambda: self.client.fine_tuning.jobs.retrieve(job.id).status in ENDED or self.state(job),
            timeout_s=timeout_s,
            every_s=2.0,
        )
        return self.client.fine_tuning.jobs.retrieve(job.id)

    def models(self) -> set[str]:
        return {model.id for model in self.client.models.list()}

    def answer(self, model: str, task: str) -> str:
        """The model's greedy answer to the committed question of a task."""
        reply = self.client.chat.completions.create(**self.world.question(task) | {"model": model})
        return (reply.choices[0].message.content or "").strip()

    def trainer_pods(self) -> list[dict[str, Any]]:
        return list(self.world.get("pods", "-l", "app.kubernetes.io/component=trainer")["items"])

    def validation_losses(self, job: FineTuningJob) -> dict[int, float]:
        """Loss by step, from the job's events. Step 0 is the base."""
        found = {}
        for event in self.client.fine_tuning.jobs.list_events(job.id, limit=100):
            data = event.data if isinstance(event.data, dict) else {}
            if data.get("full_valid_loss") is not None:
                found[int(data["step"])] = float(data["full_valid_loss"])
        return found

    def loss_of(self, model: str, lines: Sequence[Line]) -> float:
        """The mean loss over the answers' tokens in nats, from the log probabilities that the gateway answers."""
        tokenizer: Any = AutoTokenizer.from_pretrained(real_base(), local_files_only=True)

        def one(tokens: tuple[list[int], list[int]]) -> list[float]:
            prompt, answer = tokens
            reply = self.client.completions.create(
                model=model, prompt=[*prompt, *answer], max_tokens=0, echo=True, logprobs=1, temperature=0
            )
            logprobs = reply.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.token_logprobs is not None
            assert len(logprobs.token_logprobs) == len(prompt) + len(answer)
            return logprobs.token_logprobs[len(prompt) :]

        with ThreadPoolExecutor(8) as pool:
            found = [value for own in pool.map(one, [_tokens(tokenizer, line) for line in lines]) for value in own]
        return -sum(found) / len(found)


def _tokens(tokenizer: Any, line: Line) -> tuple[list[int], list[int]]:
    """(prompt, answer with the token that ends it), by transformers alone."""
    *before, last = line["messages"]
    text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    answer = tokenizer(last["content"], add_special_tokens=False)["input_ids"]
    return tokenizer(text, add_special_tokens=False)["input_ids"], [*answer, tokenizer.eos_token_id]
