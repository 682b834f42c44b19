"""A job in the trainer ends with the bits of a loop that is written with peft alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainer_kit import CONFIGS, digest, random_examples, tiny_engine, tiny_model, trained

from lorapool_trainer.engine import Example, JobSettings, Schedule, learning_rate, total_steps
from lorapool_trainer.engine.plan import batch_of

ONE_EXAMPLE = 1
"""As the size of micro-batches: the loop below computes one example at a time."""
JOBS = {
    "all linears": JobSettings(
        rank=4,
        alpha=8,
        epochs=3,
        batch_size=3,
        learning_rate=1e-2,
        seed=7,
        micro_batch_tokens=ONE_EXAMPLE,
    ),
    "attention of one layer": JobSettings(
        rank=2,
        alpha=3,
        target_modules=r"model\.layers\.1\.self_attn\.(q|v)_proj",
        epochs=3,
        batch_size=2,
        learning_rate=3e-2,
        schedule=Schedule.LINEAR,
        max_grad_norm=0.05,
        seed=11,
        micro_batch_tokens=ONE_EXAMPLE,
    ),
}


def peft_adapter(name: str, settings: JobSettings, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Trains with peft, transformers and torch alone, one example at a time, with the logits of counted
    tokens only. Gives the tensors of peft's file."""
    base = tiny_model(name)
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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls an attribute that transformers deprecates
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_ends_with_the_bits_of_a_loop_with_peft(name: str, job: str) -> None:
    examples = random_examples(1)
    engine = tiny_engine(name)
    engine.add("job", JOBS[job], examples)
    assert trained(engine, ["job"])["job"] == digest(peft_adapter(name, JOBS[job], examples))
