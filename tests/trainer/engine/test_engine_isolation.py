"""Neighbours do not change a job's bits: not by their settings, not by coming and going, not by numbers that break."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_kit import CONFIGS, digest, random_examples, tiny_engine, trained

from lorapool_trainer.engine import Engine, JobSettings, StepReport, plan_cycle

TARGETS: tuple[tuple[str, ...] | str, ...] = (
    "all-linear",
    ("q_proj", "v_proj"),
    ("o_proj", "down_proj"),
    r"model\.layers\.1\..*(gate|up)_proj",
)
JOB = JobSettings(rank=4, alpha=8, epochs=2, batch_size=3, learning_rate=1e-2, seed=7, micro_batch_tokens=24)


@functools.cache
def engine_of(name: str) -> Engine:
    return tiny_engine(name)


def alone(name: str, job: JobSettings, examples_seed: int) -> str:
    engine = engine_of(name)
    engine.add("alone", job, random_examples(examples_seed))
    found = trained(engine, ["alone"])["alone"]
    engine.remove("alone")
    return found


jobs = st.builds(
    replace,
    st.just(JOB),
    rank=st.integers(1, 9),
    target_modules=st.sampled_from(TARGETS),
    dropout=st.sampled_from((0.0, 0.0, 0.3)),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 99),
    micro_batch_tokens=st.sampled_from((1, 20, 64)),
    epochs=st.integers(1, 2),
)
neighbours = st.lists(st.tuples(jobs, st.integers(0, 99), st.integers(0, 4), st.integers(1, 9)), max_size=3)
"""Settings, seed of the examples, the cycle in which the job arrives, and after how many more it is cancelled."""


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(job=jobs, others=neighbours, budget=st.sampled_from((24, 60, 96)), first=st.booleans())
def test_a_job_ends_with_the_same_bits_alone_and_among_neighbours(
    name: str, job: JobSettings, others: list[tuple[JobSettings, int, int, int]], budget: int, first: bool
) -> None:
    want = alone(name, job, 1)
    engine = engine_of(name)
    engine.add("job", job, random_examples(1))
    cycle, present = 0, ["job"]
    while engine.offer("job").tokens:
        for number, (other, seed, arrives, stays) in enumerate(others):
            if cycle == arrives:
                engine.add(f"other-{number}", other, random_examples(seed))
                present.insert(len(present) if first else 0, f"other-{number}")
            if cycle == arrives + stays:
                engine.remove(f"other-{number}")
                present.remove(f"other-{number}")
        engine.run(plan_cycle([engine.offer(uid) for uid in present], budget))
        cycle += 1
    found = digest(engine.adapter("job"))
    for uid in present:
        engine.remove(uid)
    assert found == want


def test_a_job_whose_numbers_break_leaves_its_neighbours_unchanged_and_skips_its_steps() -> None:
    engine = engine_of("llama")
    want = {uid: alone("llama", replace(JOB, seed=seed), seed) for uid, seed in (("first", 1), ("last", 2))}
    engine.add("first", replace(JOB, seed=1), random_examples(1))
    engine.add("nan", JOB, random_examples(3))
    engine.add("huge", replace(JOB, learning_rate=1e30, max_grad_norm=0.0, seed=4), random_examples(4))
    engine.add("last", replace(JOB, seed=2), random_examples(2))
    poison(engine, "nan")
    uids = ["first", "nan", "huge", "last"]
    reports: list[StepReport] = []
    while takes := plan_cycle([engine.offer(uid) for uid in uids], engine.token_budget):
        reports += engine.run(takes).steps
    broken = {uid: [report for report in reports if report.uid == uid] for uid in ("nan", "huge")}
    assert {uid: digest(engine.adapter(uid)) for uid in want} == want
    assert [report.skipped for report in broken["nan"]] == [True] * 4
    assert [report.consecutive_skips for report in broken["nan"]] == [1, 2, 3, 4]
    assert all(math.isnan(report.grad_norm) for report in broken["nan"])
    assert broken["huge"][-1].consecutive_skips >= 2
    assert all(torch.isfinite(tensor).all() for tensor in engine.adapter("huge").values())
    assert not any(report.skipped for report in reports if report.uid in want)
    for uid in uids:
        engine.remove(uid)


def poison(engine: Engine, uid: str) -> None:
    """Puts a NaN into a weight of the job, in the first layer."""
    pair = next(iter(engine._jobs[uid].weights.pairs.values()))
    with torch.no_grad():
        pair.a[0, 0] = math.nan


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_a_restored_job_ends_with_the_bits_of_an_uninterrupted_one(updates: int) -> None:
    job = replace(JOB, dropout=0.2, micro_batch_tokens=16)
    want = alone("qwen2", job, 5)
    engine = engine_of("qwen2")
    engine.add("job", job, random_examples(5))
    while engine.state("job").step < updates:
        engine.run(plan_cycle([engine.offer("job")], 16))
    engine.run(plan_cycle([engine.offer("job")], 1))  # one micro-batch of a step that the state does not contain
    state = engine.state("job")
    engine.remove("job")
    other = tiny_engine("qwen2", token_budget=40)
    other.add("job", job, random_examples(5), state=state)
    assert digest(dict(other.state("job").tensors)) == digest(dict(state.tensors))
    assert (state.step, state.updates, state.skipped_steps) == (updates, updates, 0)
    assert trained(other, ["job"])["job"] == want
