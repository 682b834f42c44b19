"""The same bits as peft's and as alone, where matrices are large enough for several threads and several algorithms.

An example is as long as the rows that `Exact` pads to: then peft's loop, which pads nothing, computes products of as
many rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_eval_kit import real_base
from peft_loop import peft_adapter
from trainer_kit import VOCABULARY, digest, random_examples, trained
from transformers import AutoModelForCausalLM, LlamaConfig

from lorapool_trainer.engine import Engine, JobSettings, Numerics
from lorapool_trainer.engine.base import frozen_base

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers deprecates


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(model: Any, stock: Any, budget: int) -> None:
    """`stock` has the weights of `model`, which the engine takes."""
    engine = Engine(frozen_base(model), Numerics.EXACT, budget)
    size = engine.padding.rows(budget // 4)
    job = JobSettings(rank=4, alpha=8, batch_size=1, max_steps=2, learning_rate=1e-2, seed=7, micro_batch_tokens=1)
    examples = random_examples(1, 2, longest=size, shortest=size)
    want = digest(peft_adapter(stock, job, examples))
    engine.add("alone", job, examples)
    assert trained(engine, ["alone"])["alone"] == want
    engine.add("neighbour", JobSettings(rank=9, max_steps=3, batch_size=2, seed=3), random_examples(2, 6))
    engine.add("job", job, examples)
    assert trained(engine, ["neighbour", "job"])["job"] == want


def test_with_two_threads_a_job_has_the_bits_of_peft_and_of_training_alone() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    with threads(2):
        torch.manual_seed(3)
        stock = AutoModelForCausalLM.from_config(config)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        model.load_state_dict(stock.state_dict())
        check(model, stock, 512)


@pytest.mark.deep
@pytest.mark.parametrize("count", [1, 2])
def test_on_smollm2_a_job_has_the_bits_of_peft_and_of_training_alone(count: int) -> None:
    with threads(count):
        load = AutoModelForCausalLM.from_pretrained
        check(load(real_base(), dtype=torch.float32), load(real_base(), dtype=torch.float32), 1024)
