from __future__ import annotations

from typing import Any

import pytest

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.tuning.finetunejob import FineTuneJobSpec, model_alias
from lorapool_api.tuning.states import JobFailure
from lorapool_api.tuning.trainer_protocol import resolved_lora, resolved_training

UID = "0a1b2c3d-1111-2222-3333-444455556666"


def job(**spec: Any) -> FineTuneJobSpec:
    data = {"training": {"uri": "store://team-a/files/file-1"}, "validationFraction": "0.1"}
    return FineTuneJobSpec.model_validate({"baseModelRef": {"name": "tiny"}, "data": data, **spec})


def base(**tuning: Any) -> BaseModelSpec:
    return BaseModelSpec.model_validate({"source": {"uri": "hf://a/b"}, "maxModelLen": 512, "fineTuning": tuning})


def test_what_a_job_leaves_out_is_a_number_of_the_base_or_a_default() -> None:
    tuned = base(defaults={"rank": 4, "learningRate": "2e-3"})
    assert (resolved_lora(job(), tuned).rank, resolved_lora(job(), tuned).alpha) == (4, 8)
    training = resolved_training(job(), tuned)
    assert (training.epochs, training.batch_size, training.learning_rate, training.max_tokens) == (3, 8, "2e-3", 512)


def test_what_a_job_says_is_kept() -> None:
    asked = job(lora={"rank": 2, "alpha": 2}, training={"epochs": 1, "learningRate": "1e-4", "maxTokens": 64})
    assert (resolved_lora(asked, base()).rank, resolved_lora(asked, base()).alpha) == (2, 2)
    training = resolved_training(asked, base())
    assert (training.epochs, training.learning_rate, training.max_tokens) == (1, "1e-4", 64)


def test_the_model_name_of_a_result_says_base_namespace_suffix_and_job() -> None:
    assert model_alias(base="tiny", namespace="team-a", suffix="routing", job_uid=UID) == (
        "ft:tiny:team-a:routing:0a1b2c3d"
    )
    assert model_alias(base="tiny", namespace="team-a", suffix=None, job_uid=UID) == "ft:tiny:team-a::0a1b2c3d"


@pytest.mark.parametrize("suffix", [None, "s", "s" * 64])
def test_the_longest_names_still_fit_into_an_alias_and_keep_the_jobs_id(suffix: str | None) -> None:
    alias = model_alias(base="b" * 40, namespace="n" * 63, suffix=suffix, job_uid=UID)
    assert len(alias) <= 128
    assert alias.endswith(":0a1b2c3d")
    assert alias.count(":") == 4


def test_the_codes_of_failures_are_those_of_openai_where_it_has_one() -> None:
    assert JobFailure.TOO_FEW_EXAMPLES.code == "invalid_n_examples"
    of_lines = (JobFailure.INVALID_DATASET, JobFailure.EXAMPLE_TOO_LONG, JobFailure.TEMPLATE_UNSUPPORTED)
    assert {failure.code for failure in of_lines} == {"invalid_training_file"}
    assert JobFailure.BASE_CHANGED.code == "base_changed"
    assert JobFailure.GATE_NOT_MET.code == "evaluation_gate_not_met"
    assert JobFailure.DEADLINE_EXCEEDED.code == "deadline_exceeded"
