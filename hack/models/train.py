"""Trains the example fine-tunes with peft: `make train`, or `python hack/models/train.py [task ...]`.

Reads examples/finetunes/<task>/train.jsonl and writes adapter_config.json and adapter_model.safetensors into the same
folder, in a few minutes a task on two cores. The loss counts the assistant's tokens only; weights are saved in bf16.
Seeds, order and thread count are fixed: the same machine trains the same weights again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from base import prepare
from finetune_tasks import BASE_NAME, SEED, Line, Task, chosen, read_lines
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

BATCH = 8
THREADS = 2
WARMUP = 0.06
LAYER = re.compile(r"\.layers\.(\d+)\.")
IGNORED = -100  # the label that the loss ignores


@dataclass
class Example:
    ids: list[int]
    labels: list[int]
    # Input of the first trained layer, [tokens, hidden]; `run_frozen_layers` computes it once, before the first step.
    states: Tensor = field(default_factory=lambda: torch.empty(0))


def encode(tokenizer: Any, line: Line) -> Example:
    """Tokenizes prompt and answer separately, as a server that continues the prompt does."""
    *asked, answer = line["messages"]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    prompt: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    reply: list[int] = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
    reply = [*reply, tokenizer.eos_token_id]
    return Example(prompt + reply, [IGNORED] * len(prompt) + reply)


def shared_prefix(examples: list[Example]) -> int:
    """How many leading tokens (the system message) all examples share; none of them counts in the loss."""
    columns = zip(*(example.ids for example in examples), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    first_counted = min(next(at for at, mark in enumerate(example.labels) if mark != IGNORED) for example in examples)
    return min(same, first_counted - 1)


def run_frozen_layers(base: Any, examples: list[Example], first_layer: int) -> None:
    """Runs the layers below `first_layer`, which are not trained, once over every example, then removes them."""
    llama = base.model
    layers, norm = llama.layers, llama.norm
    llama.layers, llama.norm = layers[:first_layer], torch.nn.Identity()
    with torch.no_grad():
        for example in examples:
            example.states = llama(input_ids=torch.tensor([example.ids]), use_cache=False).last_hidden_state[0]
    llama.layers, llama.norm = layers[first_layer:], norm
    base.config.num_hidden_layers = len(llama.layers)
    for index, layer in enumerate(llama.layers):
        layer.self_attn.layer_idx = index  # its index in the KV cache


def loss_of(model: Any, batch: list[Example], prefix: int) -> Tensor:
    """The batch's mean loss.

    To be fast on two cores, the shared prefix runs once for the whole batch (its keys and values are expanded, and
    gradients flow back through them), and logits are computed for counted positions only.
    """
    llama = model.get_base_model()
    states, mask, labels = collate(batch)
    head = llama.model(inputs_embeds=states[:1, :prefix], use_cache=True)
    cache = head.cache
    cache.batch_repeat_interleave(len(batch))
    tail = llama.model(
        inputs_embeds=states[:, prefix:], attention_mask=mask, cache=cache, use_cache=True
    ).last_hidden_state  # [batch, width - prefix, hidden]
    labels = labels[:, prefix + 1 :]
    counted = labels != IGNORED  # [batch, width - prefix - 1]
    logits = llama.lm_head(tail[:, :-1][counted])  # [counted tokens, vocabulary]
    return torch.nn.functional.cross_entropy(logits, labels[counted])


def collate(batch: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """States [batch, width, hidden], mask and labels [batch, width]; padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    states = pad([example.states for example in batch], batch_first=True)
    mask = pad([torch.ones(len(example.ids), dtype=torch.long) for example in batch], batch_first=True)
    labels = pad([torch.tensor(example.labels) for example in batch], batch_first=True, padding_value=IGNORED)
    return states, mask, labels


def batches(examples: list[Example], steps: int, order: random.Random) -> list[list[Example]]:
    """`steps` batches from one shuffled epoch after another, so that all examples are used equally often (±1)."""
    stream: list[Example] = []
    while len(stream) < steps * BATCH:
        stream += order.sample(examples, len(examples))
    return [stream[at * BATCH : (at + 1) * BATCH] for at in range(steps)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the peak."""
    warm = max(1, round(steps * WARMUP))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(task: Task, folder: Path) -> None:
    torch.manual_seed(SEED)
    order = random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples = [encode(tokenizer, line) for line in read_lines(task.folder / "train.jsonl")]
    prefix = shared_prefix(examples)
    run_frozen_layers(base, examples, task.first_layer)
    config = LoraConfig(
        r=task.rank,
        lora_alpha=task.alpha,
        lora_dropout=0.0,
        target_modules=list(task.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.01)
    print(f"{task.name}: {len(examples)} lines, rank {task.rank} on {task.reach}, {task.steps} steps")
    model.train()
    begun = time.monotonic()
    smoothed = 0.0
    for step, batch in enumerate(batches(examples, task.steps, order)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.steps, task.learning_rate)
        loss = loss_of(model, batch, prefix)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smoothed = loss.item() if step == 0 else 0.9 * smoothed + 0.1 * loss.item()
        if (step + 1) % 10 == 0 or step + 1 == task.steps:
            elapsed = time.monotonic() - begun
            left = elapsed / (step + 1) * (task.steps - step - 1)
            print(
                f"  step {step + 1}/{task.steps}  loss {smoothed:.3f}  {elapsed:.0f} s, {left:.0f} s left", flush=True
            )
    save(model, task)


def save(model: Any, task: Task) -> None:
    """Saves with peft, in bf16, with the base's public name. Each file is replaced in one step."""
    with tempfile.TemporaryDirectory(dir=task.folder, prefix=".training-") as name:
        made = Path(name)
        model.save_pretrained(made)
        weights = {
            LAYER.sub(lambda found: f".layers.{int(found[1]) + task.first_layer}.", key): value.to(torch.bfloat16)
            for key, value in load_file(made / "adapter_model.safetensors").items()
        }
        save_file(weights, made / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.loads((made / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = BASE_NAME
        config["layers_to_transform"] = task.layers
        config["target_modules"] = sorted(config["target_modules"])
        (made / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.move(made / file, task.folder / file)
            (task.folder / file).chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example fine-tunes.")
    parser.add_argument("task", nargs="*", help="all when none is named")
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is imported: threads that spin while they wait slow a busy machine down several times.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    tasks = chosen(arguments.task)
    folder = prepare()
    for task in tasks:
        train(task, folder)


if __name__ == "__main__":
    main()
