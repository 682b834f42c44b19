"""Jobs from data to adapter in one session: figures, isolation, pause, early stopping, checkpoints, poison."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tuning_kit import Job, MakeJob, adapter_hash, run_session, write_data

from lorapool_api.tuning.states import JobFailure, JobState, RunState
from lorapool_trainer.engine import Engine
from lorapool_trainer.jobs.checkpoint import read_checkpoints
from lorapool_trainer.serve.events import EventLog
from lorapool_trainer.session import Session
from lorapool_trainer.suspects import Suspects


def test_a_job_ends_as_an_adapter_that_lowered_the_validation_loss(
    start: Callable[..., Session], make_job: MakeJob
) -> None:
    job = run_session(start(make_job("one")))["one"]
    assert job.state is JobState.SUCCEEDED
    assert job.loaded is not None
    assert (job.step, job.loaded.steps) == (16, 16)
    assert job.counters.base_loss is not None
    assert job.counters.valid_loss is not None
    assert job.counters.valid_loss < job.counters.base_loss - 0.5
    folder = job.files.folder
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (folder / "step_metrics.csv").read_text().startswith("step,train_loss,")


def test_the_validation_loss_before_the_first_step_is_that_of_the_base(
    start: Callable[..., Session], make_job: MakeJob, engine: Engine
) -> None:
    job = run_session(start(make_job("one")))["one"]
    assert job.loaded is not None
    found = engine.evaluate(None, job.loaded.validation)
    assert job.rows[0].step == 0
    assert job.rows[0].valid_loss == pytest.approx(found.loss_sum / found.counted, abs=1e-6)


def test_a_job_has_the_same_bits_alone_and_among_jobs_that_diverge_and_one_that_is_cancelled(
    start: Callable[..., Session], make_job: MakeJob
) -> None:
    alone = adapter_hash(run_session(start(make_job("one", out="alone")))["one"].files.folder)
    broken = make_job("broken", training={"learningRate": "1e3"})
    cancelled = make_job("cancelled", training={"epochs": 50})
    session = start(broken, cancelled, make_job("one"))
    run_session(session, lambda: session.jobs["cancelled"].step >= 2)
    session.put(replace(cancelled[0], run=RunState.CANCELLED), cancelled[1])
    jobs = run_session(session)
    assert adapter_hash(jobs["one"].files.folder) == alone
    failure = jobs["broken"].failure
    assert failure is not None
    assert failure.reason is JobFailure.DIVERGED
    assert "lower training.learningRate" in failure.message
    assert not (jobs["broken"].files.folder / "adapter").exists()
    kept = read_checkpoints(jobs["broken"].files.folder)[-1].state()
    assert all(bool(tensor.isfinite().all()) for tensor in kept.tensors.values())
    assert jobs["cancelled"].state is JobState.CANCELLED


def test_a_job_with_weights_that_are_no_numbers_diverges_and_its_neighbour_keeps_its_bits(
    start: Callable[..., Session], make_job: MakeJob
) -> None:
    alone = adapter_hash(run_session(start(make_job("one", out="alone")))["one"].files.folder)
    seed = run_session(start(make_job("seed", lora={"targetModules": ["q_proj"]})))["seed"].files.folder
    weights = seed / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    nan = make_job("nan", initFrom={"name": "seed"}, lora={"rank": None})
    jobs = run_session(start(nan, make_job("one")))
    assert jobs["nan"].failure is not None
    assert jobs["nan"].failure.reason is JobFailure.DIVERGED
    assert jobs["nan"].step == 3
    assert adapter_hash(jobs["one"].files.folder) == alone


def test_pausing_frees_the_engine_and_changes_no_bit(
    start: Callable[..., Session], make_job: MakeJob, engine: Engine
) -> None:
    whole = adapter_hash(run_session(start(make_job("one", out="whole")))["one"].files.folder)
    order, files = make_job("one")
    session = start((order, files))
    run_session(session, lambda: session.jobs["one"].step >= 5)
    session.put(replace(order, run=RunState.PAUSED), files)
    assert session.jobs["one"].state is JobState.PAUSED
    assert not session.has_work
    with pytest.raises(KeyError):
        engine.offer("one")
    session.put(replace(order, run=RunState.RUN), files)
    job = run_session(session)["one"]
    assert (job.state, job.counters.restarts) == (JobState.SUCCEEDED, 1)
    assert adapter_hash(files.folder) == whole


def test_a_job_that_is_paused_before_it_is_measured_reports_each_step_once_with_its_measurement(
    start: Callable[..., Session], make_job: MakeJob
) -> None:
    order, files = make_job("one")
    session, events = start((order, files)), EventLog("one")

    def to_be_measured() -> bool:
        job = session.jobs["one"]
        events.observe(job, 0.0)
        return job.measuring is not None and job.step >= 2

    run_session(session, to_be_measured)
    for run in (RunState.PAUSED, RunState.RUN):
        session.put(replace(order, run=run), files)
        events.observe(session.jobs["one"], 0.0)
    job = run_session(session, lambda: bool(events.observe(session.jobs["one"], 0.0)))["one"]
    events.observe(job, 0.0)
    figures = [event["data"] for event in map(json.loads, events.lines) if event["type"] == "metrics"]
    assert [data["step"] for data in figures] == list(range(17))
    measured = [data["step"] for data in figures if "full_valid_loss" in data]
    assert measured == [row.step for row in job.rows if row.valid_loss is not None]


def test_early_stopping_ends_with_the_best_evaluation_and_not_the_last(
    start: Callable[..., Session], make_job: MakeJob, tmp_path: Path
) -> None:
    shuffled = write_data(tmp_path / "shuffled.jsonl", shuffled=True)
    training = {"epochs": 40, "learningRate": "3e-2", "earlyStopping": {"patience": 2, "minDelta": "0.01"}}
    job = run_session(start(make_job("one", data=shuffled, training=training)))["one"]
    assert job.state is JobState.SUCCEEDED
    assert job.loaded is not None
    assert job.step < job.loaded.steps
    best = job.counters.best
    assert best.step is not None
    assert best.step < job.step
    assert job.counters.valid_loss == best.loss == min(row.valid_loss for row in job.rows[1:] if row.valid_loss)
    kept = next(found for found in job.checkpoints if found.record.step == best.step).state()
    written = load_file(job.files.folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, kept.tensors[name[17:-7]]) for name, tensor in written.items())


def test_trained_tokens_equal_a_recount_of_the_file(
    start: Callable[..., Session], make_job: MakeJob, tmp_path: Path
) -> None:
    """The recount renders ChatML by hand: one byte is one token, and each control token is one."""
    order, files = make_job("one", promotion={"policy": "Always"})
    data = order.data.model_copy(update={"validation_fraction": None})
    job = run_session(start((replace(order, data=data), files)))["one"]
    recount = 0
    for line in (tmp_path / "data.jsonl").read_text().splitlines():
        for turn in json.loads(line)["messages"]:
            recount += len(f"<{turn['role']}\n{turn['content']}>\n".encode())
    assert job.counters.trained_tokens == job.counters.computed_tokens == 4 * recount


def test_seconds_are_divided_among_the_jobs_without_rest(start: Callable[..., Session], make_job: MakeJob) -> None:
    session = start(make_job("one"), make_job("two", training={"epochs": 2}))
    jobs = run_session(session)
    assert sum(job.counters.trainer_seconds for job in jobs.values()) == pytest.approx(session.busy_s, rel=0.01)


def test_one_job_of_a_tenant_computes_nearly_half_of_the_tokens_against_fifty_of_another(
    start: Callable[..., Session], make_job: MakeJob
) -> None:
    def job(name: str, tenant: str) -> Job:
        order, files = make_job(name, training={"epochs": 20})
        data = order.data.model_copy(update={"validation_fraction": None})
        return replace(order, display=f"{tenant}/{name}", data=data), files

    session = start(*(job(f"a-{number}", "a") for number in range(50)), job("one", "b"), max_jobs=51)
    one, rest = session.jobs["one"], [found for uid, found in session.jobs.items() if uid != "one"]

    def computed() -> tuple[int, int]:
        return one.counters.computed_tokens, sum(found.counters.computed_tokens for found in rest)

    run_session(session, lambda: all(found.active for found in (one, *rest)))
    own, others = computed()
    run_session(session, lambda: one.counters.computed_tokens > own + 2000)
    assert all(found.active for found in (one, *rest))
    share = (computed()[0] - own) / (sum(computed()) - own - others)
    assert 0.45 <= share <= 0.55


def test_more_jobs_than_may_train_wait_by_priority(start: Callable[..., Session], make_job: MakeJob) -> None:
    first = make_job("first", training={"epochs": 50})
    session = start(first, make_job("low", priority=10), make_job("high", priority=90), max_jobs=1)
    jobs = session.jobs
    run_session(session, lambda: jobs["low"].state is jobs["high"].state is JobState.QUEUED)
    session.put(replace(first[0], run=RunState.CANCELLED), first[1])
    run_session(session, lambda: jobs["high"].active)
    assert (jobs["low"].state, jobs["low"].step) == (JobState.QUEUED, 0)
    run_session(session)
    assert jobs["low"].state is JobState.SUCCEEDED


def test_a_job_that_was_computing_in_two_deaths_computes_alone_and_after_three_it_is_poisoned(
    start: Callable[..., Session], make_job: MakeJob, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        Suspects(tmp_path).computing({"poison": 0, "other": 0})
    Suspects(tmp_path).computing({"other": 1})
    together: list[int] = []
    monkeypatch.setattr(engine, "run", lambda takes, run=engine.run: together.append(len(takes)) or run(takes))
    session = start(make_job("poison"), make_job("other"))
    run_session(session, lambda: session.jobs["poison"].step >= 1)
    assert set(together) == {1}
    for _ in range(3):
        Suspects(tmp_path).computing({"third": 0})
    job = run_session(start(make_job("third")))["third"]
    assert job.failure is not None
    assert job.failure.reason is JobFailure.POISONED


TURNS = [{"role": "user", "content": "say alpha"}, {"role": "assistant", "content": "alpha"}]
LONG = [TURNS[0], {"role": "assistant", "content": "a" * 200}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
REFUSED_LINES: dict[str, tuple[dict[str, object], JobFailure, str]] = {
    "no-message": ({"messages": []}, JobFailure.INVALID_DATASET, "`messages` must be a non-empty list"),
    "too-long": ({"messages": LONG}, JobFailure.EXAMPLE_TOO_LONG, "more than the 128 of maxTokens"),
    "tools": ({"messages": TURNS, "tools": [TOOL]}, JobFailure.TEMPLATE_UNSUPPORTED, "has `tools`"),
}


def test_a_job_that_was_killed_often_after_its_checkpoints_is_not_poisoned(
    start: Callable[..., Session], make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job("one")
    session = start(job)
    run_session(session, lambda: session.jobs["one"].step >= 3)
    session.close()
    place = session.jobs["one"].progress
    session.delete("one")
    for _ in range(3):
        Suspects(tmp_path).computing({"one": place - 1})
    assert run_session(start(job))["one"].state is JobState.SUCCEEDED


def test_bad_data_fails_with_its_line_and_another_job_trains_on(
    start: Callable[..., Session], make_job: MakeJob, tmp_path: Path
) -> None:
    made = []
    for name, (line, _, _) in REFUSED_LINES.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text((tmp_path / "data.jsonl").read_text() + json.dumps(line) + "\n")
        made.append(make_job(name, data=path))
    jobs = run_session(start(*made, make_job("gone", data=tmp_path / "none.jsonl"), make_job("one")))
    for name, (_, reason, said) in REFUSED_LINES.items():
        failure = jobs[name].failure
        assert failure is not None
        assert (failure.reason, failure.line) == (reason, 17)
        assert said in failure.message
    assert jobs["gone"].failure is not None
    assert jobs["gone"].failure.reason is JobFailure.SOURCE_UNAVAILABLE
    assert jobs["one"].state is JobState.SUCCEEDED


def test_checkpoints_of_other_settings_are_refused_by_name(start: Callable[..., Session], make_job: MakeJob) -> None:
    order, files = make_job("one")
    session = start((order, files))
    run_session(session, lambda: session.jobs["one"].step >= 3)
    session.close()
    session.delete("one")
    job = run_session(start(make_job("one", training={"seed": 8})))["one"]
    assert job.failure is not None
    assert job.failure.reason is JobFailure.INCOMPATIBLE
    assert "settings (seed)" in job.failure.message


def test_a_job_whose_base_has_other_files_than_at_its_begin_ends_as_base_changed(
    start: Callable[..., Session], make_job: MakeJob
) -> None:
    order, files = make_job("one")
    session = start((order, files))
    run_session(session, lambda: session.jobs["one"].step >= 3)
    session.close()
    session.delete("one")
    jobs = run_session(start((order, files), make_job("other"), base="base-2"))
    failure = jobs["one"].failure
    assert failure is not None
    assert failure.reason is JobFailure.BASE_CHANGED
    assert "were base-1 when the job began and are base-2 now" in failure.message
    assert jobs["other"].state is JobState.SUCCEEDED


def test_a_target_that_the_base_does_not_have_is_refused_by_name(
    start: Callable[..., Session], make_job: MakeJob
) -> None:
    job = run_session(start(make_job("one", lora={"targetModules": ["w_proj"]})))["one"]
    assert job.failure is not None
    assert job.failure.reason is JobFailure.INCOMPATIBLE
    assert "w_proj" in job.failure.message


def test_a_damaged_checkpoint_is_passed_over(start: Callable[..., Session], make_job: MakeJob) -> None:
    order, files = make_job("one", checkpoints={"every": "0s", "keep": 16})
    session = start((order, files))
    run_session(session, lambda: session.jobs["one"].step >= 4)
    session.close()
    session.delete("one")
    *_, before, newest = read_checkpoints(files.folder)
    (newest.path / "state.safetensors").write_bytes(b"cut")
    assert read_checkpoints(files.folder)[-1].name == before.name
