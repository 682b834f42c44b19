"""docs/reference/models.md says of each architecture what the torch engine does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_zoo import CASES, PAGE, SERVED, Case, model_type, outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers, about its own tiny configurations
    pytest.mark.usefixtures("quiet_transformers"),
]

QUICK = (
    "Gemma 1",
    "Mistral Small 3.1, 3.2",
    "Qwen 2.5 VL",
    "Llama 3, quantized (AWQ, GPTQ, bitsandbytes, FP8)",
    "Phi 3 mini 128k, Phi 4 mini",
    "BLOOM",
    "GPT-2",
)
"""What is served, and each way to be refused."""


@pytest.fixture
def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def rows() -> dict[str, tuple[str, str]]:
    """By the models: their type, and what the page says of them."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if " | `" in line]
    return {models: (kind.strip("`"), said) for models, kind, said, *_ in lines if models != "models"}


def test_the_page_has_a_line_for_every_architecture_of_the_zoo() -> None:
    assert {case.models: model_type(case) for case in CASES} == {name: kind for name, (kind, _) in rows().items()}


def test_what_is_not_served_is_refused_in_our_own_words() -> None:
    for models, (_, said) in rows().items():
        assert said == SERVED or said.startswith("refused: "), models
        assert "cannot run it here" not in said, models  # what transformers raised


@pytest.mark.parametrize("case", [case for case in CASES if case.models in QUICK], ids=lambda case: case.models)
def test_the_engine_does_what_the_page_says(case: Case, tmp_path: Path) -> None:
    assert outcome(case, tmp_path) == rows()[case.models][1]


@pytest.mark.deep
@pytest.mark.parametrize("case", [case for case in CASES if case.models not in QUICK], ids=lambda case: case.models)
def test_the_engine_does_what_the_page_says_of_all_others(case: Case, tmp_path: Path) -> None:
    assert outcome(case, tmp_path) == rows()[case.models][1]
