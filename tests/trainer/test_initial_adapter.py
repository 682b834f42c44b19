"""Jobs that continue an adapter: its weights, rank, alpha, layers, chat template and tokens, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tuning_kit import MakeJob, adapter_hash, run_command, run_session, write_data, write_job

from lorapool_api.tuning.states import JobFailure, JobState, RunState
from lorapool_trainer.engine import Engine
from lorapool_trainer.session import Session

Start = Callable[..., Session]
FIRST = {"rank": 3, "alpha": 5, "targetModules": ["q_proj", "down_proj"]}
"""The adapter to continue."""
CONTINUE = {"initFrom": {"name": "first"}, "lora": {"rank": None}}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LOUD = (
    "{% for m in messages %}<{{ m.role }}\n!!{{ m.content }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant\n!!{% endif %}"
)


@pytest.fixture
def first(start: Start, make_job: MakeJob) -> Path:
    """The adapter's folder."""
    return run_session(start(make_job("first", lora=FIRST)))["first"].files.folder / "adapter"


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / CONFIG).read_text())
    return found


def change(folder: Path, **settings: object) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **settings}))


def test_a_job_begins_with_the_weights_rank_alpha_and_layers_of_the_adapter(
    start: Start, make_job: MakeJob, first: Path, engine: Engine
) -> None:
    session = start(make_job("second", **CONTINUE))
    run_session(session, lambda: session.jobs["second"].active)
    begun, trained = engine.adapter("second"), load_file(first / WEIGHTS)
    assert begun.keys() == trained.keys()
    if session.jobs["second"].step == 0:
        assert all(torch.equal(begun[name], tensor) for name, tensor in trained.items())
    job = run_session(session)["second"]
    assert job.state is JobState.SUCCEEDED
    made = job.files.folder / "adapter"
    assert {name: config_of(made)[name] for name in ("r", "lora_alpha", "target_modules")} == {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["down_proj", "q_proj"],
    }
    assert not all(torch.equal(load_file(made / WEIGHTS)[name], tensor) for name, tensor in trained.items())


def test_a_continued_job_that_pauses_ends_with_the_same_bits(start: Start, make_job: MakeJob, first: Path) -> None:
    whole = adapter_hash(run_session(start(make_job("whole", **CONTINUE)))["whole"].files.folder)
    order, files = make_job("parts", **CONTINUE)
    session = start((order, files))
    run_session(session, lambda: session.jobs["parts"].step >= 3)
    session.put(replace(order, run=RunState.PAUSED), files)
    session.put(replace(order, run=RunState.RUN), files)
    assert adapter_hash(run_session(session)["parts"].files.folder) == whole
    assert whole != adapter_hash(run_session(start(make_job("fresh", lora=FIRST)))["fresh"].files.folder)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 4}, "spec.lora.rank is 4, but the adapter of spec.initFrom has 3; leave spec.lora.rank out"),
        ({"rank": None, "alpha": 6}, "spec.lora.alpha is 6, but the adapter of spec.initFrom has 5"),
        ({"rank": None, "targetModules": ["q_proj"]}, "spec.lora.targetModules is q_proj, but the adapter"),
    ],
)
def test_settings_that_conflict_with_the_adapter_are_refused_with_the_remedy(
    start: Start, make_job: MakeJob, first: Path, lora: dict[str, object], said: str
) -> None:
    failure = run_session(start(make_job("second", initFrom={"name": "first"}, lora=lora)))["second"].failure
    assert failure is not None
    assert failure.reason is JobFailure.INCOMPATIBLE
    assert said in failure.message


def test_settings_that_repeat_those_of_the_adapter_are_accepted(start: Start, make_job: MakeJob, first: Path) -> None:
    job = run_session(start(make_job("second", initFrom={"name": "first"}, lora=FIRST)))["second"]
    assert job.state is JobState.SUCCEEDED


def test_the_chat_template_and_tokens_of_the_adapter_are_trained_with_and_kept(
    start: Start, make_job: MakeJob, first: Path
) -> None:
    (first / "chat_template.jinja").write_text(LOUD)
    (first / "generation_config.json").write_text('{"eos_token_id": 257}')
    (first / "README.md").write_text("not part of an adapter")
    jobs = run_session(start(make_job("plain"), make_job("second", **CONTINUE)))
    plain, second = jobs["plain"].loaded, jobs["second"].loaded
    assert plain is not None
    assert second is not None
    loud = [bytes(token for token in example.ids if token < 256).count(b"!!") for example in second.training]
    assert loud == [2] * len(plain.training)
    made = jobs["second"].files.folder / "adapter"
    assert (made / "chat_template.jinja").read_text() == LOUD
    assert sorted(path.name for path in made.iterdir()) == sorted(
        [CONFIG, WEIGHTS, "chat_template.jinja", "generation_config.json"]
    )


def several_ranks(folder: Path) -> None:
    change(folder, rank_pattern={"q_proj": 2})


def dora(folder: Path) -> None:
    change(folder, use_dora=True)


def an_output_layer(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / WEIGHTS)


def a_layer_that_the_base_lacks(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def damage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"cut")


def a_template_without_end(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (several_ranks, "several ranks or scales"),
        (dora, "the adapter to continue is refused"),
        (an_output_layer, "the tensor base_model.model.lm_head.weight"),
        (a_layer_that_the_base_lacks, "layers.7."),
        (damage, "is damaged"),
        (a_template_without_end, "chat template cannot be used"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused_with_the_reason(
    start: Start, make_job: MakeJob, first: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(first)
    failure = run_session(start(make_job("second", **CONTINUE)))["second"].failure
    assert failure is not None
    assert failure.reason is JobFailure.INCOMPATIBLE
    assert said in failure.message


def test_a_job_whose_adapter_changed_meanwhile_does_not_continue(start: Start, make_job: MakeJob, first: Path) -> None:
    order, files = make_job("second", **CONTINUE)
    session = start((order, files))
    run_session(session, lambda: session.jobs["second"].step >= 3)
    session.close()
    session.delete("second")
    save_file({name: tensor * 2 for name, tensor in load_file(first / WEIGHTS).items()}, first / WEIGHTS)
    failure = run_session(start((order, files)))["second"].failure
    assert failure is not None
    assert failure.reason is JobFailure.INCOMPATIBLE
    assert "data or the adapter of initFrom changed since" in failure.message


def test_a_name_without_an_adapter_is_refused_before_the_base_is_loaded(base: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, "second", write_data(tmp_path / "data.jsonl"), **CONTINUE)
    done = run_command(base, tmp_path / "out", job)
    assert done.returncode == 2
    assert "spec.initFrom names first, but" in done.stderr
    assert "train that job first" in done.stderr
