"""A job in the trainer ends with the bits of a loop that is written with peft alone."""

from __future__ import annotations

import pytest
from peft_loop import peft_adapter
from trainer_kit import CONFIGS, digest, random_examples, tiny_engine, tiny_model, trained

from lorapool_trainer.engine import JobSettings, Schedule

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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls an attribute that transformers deprecates
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_ends_with_the_bits_of_a_loop_with_peft(name: str, job: str) -> None:
    examples = random_examples(1)
    engine = tiny_engine(name)
    engine.add("job", JOBS[job], examples)
    assert trained(engine, ["job"])["job"] == digest(peft_adapter(tiny_model(name), JOBS[job], examples))
