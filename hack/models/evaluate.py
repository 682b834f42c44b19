"""Scores base and fine-tunes on the held-out lines: `make eval`, or `python hack/models/evaluate.py [task ...]`.

Both get the same messages through the base's own chat template and answer greedily in fp32; finetune_metrics.py
scores the answers. Prints a table, writes examples/finetunes/scores.json (with the weights' hash, so that a
score cannot outlive the weights it was measured on) and the model cards. `--answers DIR` keeps every answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from base import prepare
from cards import write_cards
from finetune_metrics import SCORERS, Scores
from finetune_tasks import BASE_NAME, SCORES, TASKS, Line, Task, chosen, read_lines
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

BATCH = 32
THREADS = 2


def answers(model: Any, tokenizer: Any, lines: list[Line], max_tokens: int) -> list[str]:
    """Greedy answers, in the order of the lines. Prompts are padded on the left."""
    prompts = [
        tokenizer.apply_chat_template(line["messages"][:-1], tokenize=False, add_generation_prompt=True)
        for line in lines
    ]
    # Prompts of similar length share a batch, so that little is padded.
    order = sorted(range(len(lines)), key=lambda at: len(prompts[at]))
    found = [""] * len(lines)
    for start in range(0, len(order), BATCH):
        chosen_rows = order[start : start + BATCH]
        batch = tokenizer(
            [prompts[at] for at in chosen_rows],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
        fresh = out[:, batch["input_ids"].shape[1] :]  # [batch, new tokens]
        for at, text in zip(chosen_rows, tokenizer.batch_decode(fresh, skip_special_tokens=True), strict=True):
            found[at] = text
    return found


def mean(scores: list[Scores]) -> Scores:
    return {key: round(sum(one[key] for one in scores) / len(scores), 4) for key in scores[0]}


def evaluate(task: Task, base: Any, tokenizer: Any, keep: Path | None) -> dict[str, Any]:
    lines = read_lines(task.folder / "heldout.jsonl")
    score = SCORERS[task.name]
    begun = time.monotonic()
    plain = answers(base, tokenizer, lines, task.max_tokens)
    tuned_model = PeftModel.from_pretrained(base, task.folder)
    tuned = answers(tuned_model, tokenizer, lines, task.max_tokens)
    tuned_model.unload()
    print(f"{task.name}: {len(lines)} lines, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "question": line["messages"][-2]["content"],
                "wanted": line["messages"][-1]["content"],
                "base": without,
                "finetune": with_it,
                "scores": score(with_it, line),
            }
            for line, without, with_it in zip(lines, plain, tuned, strict=True)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (keep / f"{task.name}.jsonl").write_text(text, encoding="utf-8")
    weights = (task.folder / "adapter_model.safetensors").read_bytes()
    return {
        "measure": task.measure,
        "measured": task.measured,
        "heldout_lines": len(lines),
        "max_tokens": task.max_tokens,
        "base": mean([score(answer, line) for answer, line in zip(plain, lines, strict=True)]),
        "finetune": mean([score(answer, line) for answer, line in zip(tuned, lines, strict=True)]),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def table(scores: dict[str, Any]) -> str:
    rows = [f"{'task':<12} {'measure':<12} {'lines':>5} {'base':>7} {'fine-tune':>9}"]
    for name, score in scores["tasks"].items():
        for key in score["base"]:
            before, after = score["base"][key], score["finetune"][key]
            rows.append(f"{name:<12} {key:<12} {score['heldout_lines']:>5} {before:>7.1%} {after:>9.1%}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score base and fine-tunes on the held-out lines.")
    parser.add_argument("task", nargs="*", help="all when none is named")
    parser.add_argument("--answers", type=Path, metavar="DIR", help="write every answer there")
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is imported: threads that spin while they wait slow a busy machine down several times.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    tasks = chosen(arguments.task)
    folder = prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores: dict[str, Any] = {"base_model": BASE_NAME, "decoding": "greedy, fp32", "tasks": {}}
    if SCORES.exists():
        scores["tasks"] = json.loads(SCORES.read_text())["tasks"]
    for task in tasks:
        scores["tasks"][task.name] = evaluate(task, base, tokenizer, arguments.answers)
        scores["tasks"] = dict(sorted(scores["tasks"].items()))
        SCORES.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(scores))
    if set(scores["tasks"]) == set(TASKS):
        write_cards()


if __name__ == "__main__":
    main()
