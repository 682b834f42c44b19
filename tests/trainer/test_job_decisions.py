"""When a job is measured, which result is the best, when it stops or has diverged, and what its files look like."""

from __future__ import annotations

import csv
import io
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lorapool_trainer.jobs.curve import loss_curve
from lorapool_trainer.jobs.history import Row, as_csv, progress, recent_loss, with_validation
from lorapool_trainer.jobs.validation import Best, StoppingRule, broken_after, evaluation_interval, is_due
from lorapool_trainer.suspects import Suspects

RULE = StoppingRule(patience=2, min_delta=0.1)
ROWS = [Row(step=0, valid_loss=3.0, valid_accuracy=0.1), Row(step=1, train_loss=2.5, train_accuracy=0.2)]


def test_a_job_is_measured_ten_times_and_after_its_last_step() -> None:
    interval = evaluation_interval(95, 500, 2000)
    due = [step for step in range(96) if is_due(step, 95, interval)]
    assert due == [10, 20, 30, 40, 50, 60, 70, 80, 90, 95]


def test_a_large_validation_set_is_measured_less_often() -> None:
    assert evaluation_interval(100, 500, 20_000) == 40


def best_of(*losses: float) -> Best:
    best = Best()
    for step, loss in enumerate(losses):
        best = best.after(loss, 0.5, step, RULE)
    return best


def test_training_stops_when_the_loss_has_not_fallen_noticeably_for_as_long_as_the_patience() -> None:
    assert not best_of(3.0, 2.5, 2.45).stops(RULE)
    stopped = best_of(3.0, 2.5, 2.45, 2.44)
    assert stopped.stops(RULE)
    assert (stopped.loss, stopped.step) == (2.44, 3)
    assert not stopped.stops(None)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    best = best_of(3.0, math.nan, math.nan)
    assert (best.loss, best.step, best.stops(RULE)) == (3.0, 0, True)


@pytest.mark.parametrize(("loss", "skipped", "expected"), [(2.0, False, 0), (math.nan, True, 3), (1e9, False, 3)])
def test_steps_are_broken_by_what_is_not_finite_and_by_losses_that_no_learning_gives(
    loss: float, skipped: bool, expected: int
) -> None:
    assert broken_after(2, loss, skipped) == expected


def test_the_csv_has_the_columns_of_openais_result_files() -> None:
    rows = with_validation([*ROWS], 1, 2.25, 0.25)
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert list(read[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert list(read[0].values()) == ["0", "", "", "3.00000", "0.10000"]
    assert list(read[1].values()) == ["1", "2.50000", "0.20000", "2.25000", "0.25000"]


def test_the_training_loss_is_the_mean_of_the_last_steps() -> None:
    assert recent_loss([Row(step=step, train_loss=float(step)) for step in range(100)]) == 94.5
    assert recent_loss([]) is None


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_the_loss_curve_is_a_picture_of_bounded_size_for_any_number_of_steps(count: int) -> None:
    rows = [Row(step=step, train_loss=3 / (1 + step), valid_loss=2.0 if step == 3 else None) for step in range(count)]
    picture = loss_curve("team/<routing>", rows)
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert len(picture) < 40_000


def died(folder: Path, **steps: int) -> Suspects:
    """A process that computed these steps and died; the next one reads what it left."""
    Suspects(folder).computing(steps)
    return Suspects(folder)


def test_deaths_at_the_same_step_add_up_and_a_regular_end_is_no_death(tmp_path: Path) -> None:
    assert died(tmp_path, poison=3, other=7).deaths("poison") == 1
    assert died(tmp_path, poison=3, other=8).deaths("other") == 1
    third = died(tmp_path, poison=3)
    assert (third.deaths("poison"), third.deaths("other"), third.deaths("unknown")) == (3, 1, 0)
    third.computing({"poison": 3})
    third.close()
    assert Suspects(tmp_path).deaths("poison") == 3


def test_a_job_that_gets_further_is_no_suspect_any_more(tmp_path: Path) -> None:
    after = died(tmp_path, job=3)
    after.computing({"job": 4})
    assert after.deaths("job") == 0


def test_a_job_whose_checkpoint_is_behind_the_place_of_its_deaths_got_further(tmp_path: Path) -> None:
    """The process was killed after it had written the checkpoint, and before the file named the next place."""
    for _ in range(2):
        died(tmp_path, job=3)
    after = died(tmp_path, job=3)
    after.reached("job", 3)
    assert after.deaths("job") == 3
    after.reached("job", 4)
    assert after.deaths("job") == 0


def test_progress_grows_with_each_step_and_each_measurement() -> None:
    measured = with_validation([*ROWS], 1, 2.25, 0.25)
    assert [progress(0, []), progress(0, ROWS[:1]), progress(1, ROWS), progress(1, measured)] == [0, 1, 2, 3]
