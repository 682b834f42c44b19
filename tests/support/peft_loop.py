"""A training loop that is written with peft alone, to compare the trainer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorapool_trainer.engine import Example, JobSettings, learning_rate, total_steps
from lorapool_trainer.engine.plan import batch_of


def peft_adapter(base: Any, settings: JobSettings, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Trains with peft, transformers and torch alone, one example at a time, with the logits of counted tokens only.

    Returns the tensors of peft's file.
    """
    torch.manual_seed(settings.seed)
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    model.train()
    steps = total_steps(settings, len(examples))
    for step in range(steps):
        batch = [examples[index] for index in batch_of(settings, len(examples), step)]
        counted = sum(example.counted_tokens for example in batch)
        for example in batch:
            at = torch.tensor([i - 1 for i in range(1, len(example.ids)) if example.counted[i]])
            ids = torch.tensor(example.ids)
            logits = model(input_ids=ids[None], logits_to_keep=at).logits[0]
            (cross_entropy(logits, ids[at + 1], reduction="sum") / counted).backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        optimizer.step()
        optimizer.zero_grad()
    return {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(model).items()}
