"""lm-eval, unmodified, on the small task in `tests/lm_eval`, and the same score by transformers and peft directly.

`make lm-eval` installs the harness; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "lm_eval"
ROUTING = ROOT / "examples" / "finetunes" / "routing"
TASK = "lorapool_queues"
QUEUES = ("billing", "delivery", "returns", "account", "technical", "sales")


@dataclass(frozen=True)
class Score:
    acc: float
    acc_norm: float
    loglikelihoods: list[list[float]]
    """[messages][queues], in nats."""


def real_base() -> Path:
    folder = os.environ.get("LORAPOOL_TEST_BASE", "")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip("LORAPOOL_TEST_BASE names no base model folder: `make test` makes it and sets it")
    return Path(folder)


def harness() -> Path:
    command = Path(os.environ.get("LORAPOOL_LM_EVAL", ROOT / ".venv-lm-eval" / "bin" / "lm_eval"))
    if not command.is_file():
        pytest.skip(f"no lm-eval at {command}: `make lm-eval` installs it")
    return command


def score_by_harness(url: str, api_key: str, model: str, base: Path, out: Path) -> Score:
    """`lm_eval --model local-completions` against an OpenAI base URL ending in /v1."""
    arguments = f"model={model},base_url={url}/completions,tokenizer={base},num_concurrent=4,max_retries=3"
    environ = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "NO_PROXY")}
    environ |= {"OPENAI_API_KEY": api_key, "HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [
            str(harness()), "run", "--model", "local-completions", "--model_args", arguments, "--tasks", TASK,
            "--include_path", str(FOLDER), "--output_path", str(out), "--log_samples", "--batch_size", "3",
        ],
        cwd=FOLDER, env=environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob(f"samples_{TASK}_*.jsonl")
    results_of_task = json.loads(results.read_text())["results"][TASK]
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return Score(
        acc=results_of_task["acc,none"],
        acc_norm=results_of_task["acc_norm,none"],
        loglikelihoods=[[float(one[0][0]) for one in row["resps"]] for row in rows],
    )


def score_directly(base: Path, adapter: Path | None) -> Score:
    """The same score by transformers, or peft, with one forward pass per message in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
    docs = [json.loads(line) for line in (FOLDER / "queues.jsonl").read_text().splitlines()]
    right = right_norm = 0
    found = []
    for doc in docs:
        scores = _loglikelihoods(model, tokenizer, _context(doc["message"]))
        wanted = QUEUES.index(doc["queue"])
        right += scores.index(max(scores)) == wanted
        normed = [score / len(queue) for score, queue in zip(scores, QUEUES, strict=True)]
        right_norm += normed.index(max(normed)) == wanted
        found.append(scores)
    return Score(right / len(docs), right_norm / len(docs), found)


def _context(message: str) -> str:
    system = "Name the queue: billing, delivery, returns, account, technical or sales."
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"


def _loglikelihoods(model: Any, tokenizer: Any, context: str) -> list[float]:
    """Of each queue after the context. White space at the context's end counts as the queue's, as in lm-eval."""
    begin = len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
    rows = [tokenizer(context + queue, add_special_tokens=False)["input_ids"] for queue in QUEUES]
    longest = max(len(row) for row in rows)
    padded = torch.tensor(
        [row + [0] * (longest - len(row)) for row in rows]
    )  # padding does not change the positions before it
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(padded).logits, dim=-1)  # [queues, tokens, vocabulary]
    return [
        float(sum(logprobs[number, place - 1, row[place]] for place in range(begin, len(row))))
        for number, row in enumerate(rows)
    ]


def assert_equal(found: Score, wanted: Score) -> None:
    assert (found.acc, found.acc_norm) == pytest.approx((wanted.acc, wanted.acc_norm), abs=1e-9)
    for got, expected in zip(found.loglikelihoods, wanted.loglikelihoods, strict=True):
        assert got == pytest.approx(expected, abs=2e-3)
