"""The parts of the engine by themselves: targets, dropout, padding, memory, evaluation, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from trainer_kit import CONFIGS, VOCABULARY, random_examples, tiny_engine, tiny_model

from lorapool_trainer.engine import (
    Example,
    JobSettings,
    MemoryFigures,
    Numerics,
    TargetError,
    UnsupportedBaseError,
    plan_cycle,
)
from lorapool_trainer.engine.base import frozen_base
from lorapool_trainer.engine.dropout import Dropout, row_keys
from lorapool_trainer.engine.exactness import RowPadding, measure_padding
from lorapool_trainer.engine.memory import admission
from lorapool_trainer.engine.targets import chosen_targets

LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")
JOB = JobSettings(rank=2, epochs=1, batch_size=2)


@pytest.mark.parametrize(
    ("target_modules", "chosen"),
    [
        ("all-linear", LINEARS),
        (("q_proj",), (LINEARS[0], LINEARS[2])),
        (("up_proj", LINEARS[2]), LINEARS[1:]),
        (r".*\.1\..*", LINEARS[2:]),
    ],
)
def test_target_modules_match_as_in_peft(target_modules: tuple[str, ...] | str, chosen: tuple[str, ...]) -> None:
    assert chosen_targets(target_modules, LINEARS) == chosen


@pytest.mark.parametrize("target_modules", [("q_proj", "lm_head"), ("proj",), "q_proj", (), "(", ""])
def test_target_modules_that_match_nothing_are_refused_with_what_can_be_named(
    target_modules: tuple[str, ...] | str,
) -> None:
    with pytest.raises(TargetError, match="name some of q_proj, up_proj, or use 'all-linear'"):
        chosen_targets(target_modules, LINEARS)


def test_all_linears_of_a_base_are_targets_but_its_output_layer() -> None:
    targets = tiny_engine().targets(JOB)
    assert len(targets) == 14
    assert not any("lm_head" in name for name in targets)


def test_dropout_depends_on_the_place_and_not_on_the_rows_around_it() -> None:
    examples, positions = torch.tensor([4, 4, 9, 9]), torch.tensor([0, 1, 0, 1])
    whole = Dropout(0.3, row_keys(1, 2, examples, positions)).scale("layer", 50)
    part = Dropout(0.3, row_keys(1, 2, examples[2:], positions[2:])).scale("layer", 50)
    assert torch.equal(whole[2:], part)
    others = [
        Dropout(0.3, row_keys(7, 2, examples, positions)).scale("layer", 50),
        Dropout(0.3, row_keys(1, 3, examples, positions)).scale("layer", 50),
        Dropout(0.3, row_keys(1, 2, examples, positions)).scale("other", 50),
    ]
    assert not any(torch.equal(whole, other) for other in others)
    assert not torch.equal(whole[0], whole[1])


def test_dropout_drops_its_share_and_keeps_the_expected_value() -> None:
    keys = row_keys(1, 2, torch.arange(400), torch.zeros(400, dtype=torch.long))
    scale = Dropout(0.25, keys).scale("layer", 500)
    assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((scale == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert float(scale.mean()) == pytest.approx(1.0, abs=0.005)


def test_rows_are_padded_to_the_floor_and_to_multiples() -> None:
    assert [RowPadding(64, 16).rows(tokens) for tokens in (1, 64, 65)] == [64, 64, 80]


def test_the_measured_padding_gives_each_row_the_same_bits() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1536, 64, bias=False)
    padding = measure_padding([linear], 256)
    x = torch.randn(256, 1536)
    want = linear(x)
    for tokens in (1, 17, 100, 201):
        assert torch.equal(linear(x[: min(256, padding.rows(tokens))])[:tokens], want[:tokens])


def test_fast_numerics_pad_no_rows() -> None:
    engine = tiny_engine(numerics=Numerics.FAST)
    engine.add("job", JOB, random_examples(1))
    report = engine.run(plan_cycle([engine.offer("job")], 1000))
    assert report.rows == sum(report.tokens.values())


def test_the_figures_of_an_admission_add_up() -> None:
    figures = MemoryFigures(base=4 * 2**30, fixed=2**30, adapters=2**29, activations=2**30)
    fits = admission(figures, 2**25, 8 * 2**30)
    assert (fits.needed, fits.fits) == (7 * 2**30, True)
    refused = admission(figures, 2**26, 8 * 2**30)
    assert not refused.fits
    assert "needs 7.50 GiB" in refused.message
    assert "90% of the memory limit is 7.20 GiB" in refused.message


def test_memory_is_measured_and_counts_16_bytes_for_each_parameter_of_the_jobs() -> None:
    engine = tiny_engine()
    engine.add("job", JOB, random_examples(1))
    parameters = sum(tensor.numel() for tensor in engine.adapter("job").values())
    before = engine.offer("job")
    figures = engine.memory()
    assert figures.adapters == 16 * parameters
    assert figures.base == sum(parameter.nbytes for parameter in engine.base.model.parameters()) + sum(
        buffer.nbytes for buffer in engine.base.model.buffers()
    )
    admitted = engine.admits(JOB, 2**40)
    assert admitted.needed == figures.base + figures.fixed + figures.activations + 2 * figures.adapters
    assert engine.offer("job") == before


@pytest.mark.parametrize("name", CONFIGS)
def test_an_evaluation_of_a_new_job_is_that_of_the_stock_model(name: str) -> None:
    model, examples = tiny_model(name).eval(), random_examples(2, count=9, longest=40)
    losses = [stock_loss(model, example) for example in examples]
    engine = tiny_engine(name)
    engine.add("job", JOB, examples)
    base, job = engine.evaluate(None, examples), engine.evaluate("job", examples)
    assert base == job
    assert base.loss_sum == pytest.approx(sum(losses), rel=1e-5)
    assert base.counted == sum(example.counted_tokens for example in examples)
    assert base.tokens == sum(len(example.ids) for example in examples)


def stock_loss(model: Any, example: Example) -> float:
    """Of transformers' own loss function, summed over the counted tokens."""
    labels = [token if counted else -100 for token, counted in zip(example.ids, example.counted, strict=True)]
    labels[0] = -100
    with torch.no_grad():
        out = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels]))
    return float(out.loss) * example.counted_tokens


def test_training_lowers_the_loss_and_reports_steps_and_tokens() -> None:
    engine = tiny_engine()
    examples = random_examples(1)
    engine.add("job", replace(JOB, epochs=12, learning_rate=2e-2, rank=8), examples)
    before = engine.evaluate("job", examples)
    steps = []
    tokens = 0
    while takes := plan_cycle([engine.offer("job")], engine.token_budget):
        report = engine.run(takes)
        steps += report.steps
        tokens += report.tokens["job"]
    assert [step.step for step in steps] == list(range(1, 37))
    assert tokens == engine.state("job").trained_tokens == 12 * sum(len(example.ids) for example in examples)
    assert steps[-1].loss < 0.6 * steps[0].loss
    after = engine.evaluate("job", examples)
    assert after.loss_sum < 0.6 * before.loss_sum
    assert after.correct > before.correct


def test_a_job_can_begin_with_the_weights_of_an_adapter() -> None:
    engine = tiny_engine()
    engine.add("first", JOB, random_examples(1))
    engine.run(plan_cycle([engine.offer("first")], 1000))
    adapter = engine.adapter("first")
    engine.add("second", replace(JOB, seed=9), random_examples(2), initial=adapter)
    assert all(torch.equal(adapter[name], tensor) for name, tensor in engine.adapter("second").items())
    with pytest.raises(ValueError, match="use the rank and the target modules of the adapter"):
        engine.add("third", replace(JOB, rank=3), random_examples(2), initial=adapter)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example((1, 2, 3), (False, True)), "3 tokens but 2 marks"),
        (Example((1,) * 65, (True,) * 65), "65 tokens; the base computes at most 64"),
        (Example((1, 2), (True, False)), "no counted token"),
        (Example((1, VOCABULARY), (True, True)), "outside of the vocabulary of 96"),
    ],
)
def test_an_example_that_cannot_be_computed_is_refused_with_its_number(example: Example, message: str) -> None:
    with pytest.raises(ValueError, match=f"example 2 has .*{message}"):
        tiny_engine().add("job", JOB, [Example((1, 2), (True, True)), example])


def test_a_base_that_mixes_neighbouring_rows_is_refused() -> None:
    model = tiny_model("llama")
    before: Callable[..., Any] = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: before(x) + 0.5 * before(x).roll(1, dims=1)
    with pytest.raises(UnsupportedBaseError, match="mixes neighbouring rows"):
        frozen_base(model)


def test_when_memory_runs_out_the_budget_is_halved_and_the_step_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = tiny_engine(token_budget=64), tiny_engine(token_budget=64)
    for each in (engine, other):
        each.add("job", replace(JOB, batch_size=6, micro_batch_tokens=16), random_examples(1))
    engine.run(plan_cycle([engine.offer("job")], 16))
    whole = type(engine)._forward_and_backward
    monkeypatch.setattr(type(engine), "_forward_and_backward", out_of_memory)
    report = engine.run(plan_cycle([engine.offer("job")], engine.token_budget))
    assert report.out_of_memory
    assert (engine.token_budget, report.tokens, report.steps) == (32, {}, ())
    assert engine.offer("job") == other.offer("job")
    monkeypatch.setattr(type(engine), "_forward_and_backward", whole)
    for each in (engine, other):
        while takes := plan_cycle([each.offer("job")], each.token_budget):
            each.run(takes)
    ours, theirs = engine.adapter("job"), other.adapter("job")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


def test_a_micro_batch_that_does_not_fit_by_itself_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(token_budget=8)
    engine.add("job", JOB, [Example((1,) * 20, (True,) * 20)])
    monkeypatch.setattr(type(engine), "_forward_and_backward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(plan_cycle([engine.offer("job")], engine.token_budget))
