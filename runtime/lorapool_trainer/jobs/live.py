"""One job in this process: how far it is, what was measured, and what happens after a step and after an evaluation.

The engine computes; this module keeps the counters, decides what comes next for the job alone, and writes its files.
Used by the session's thread alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorapool_api.tuning.states import JobFailure, JobState
from lorapool_trainer.data.dataset import Dataset, slices
from lorapool_trainer.engine import Engine, Evaluation, Example, JobSettings, StepReport, total_steps
from lorapool_trainer.jobs.adapter_folder import AdapterFolder, adapter_of, write_adapter
from lorapool_trainer.jobs.checkpoint import (
    Checkpoint,
    Counters,
    Origin,
    read_checkpoints,
    superseded,
    write_checkpoint,
)
from lorapool_trainer.jobs.curve import loss_curve
from lorapool_trainer.jobs.history import Row, as_csv, finite, progress, with_validation
from lorapool_trainer.jobs.initial import InitialAdapter
from lorapool_trainer.jobs.order import ADAPTER, JobFiles, JobOrder
from lorapool_trainer.jobs.validation import BROKEN_STEPS, broken_after, evaluation_interval, is_due

EVALUATION_TOKENS = 1024
"""Tokens of one piece of an evaluation, so that other jobs compute in between."""
METRICS_FILE, CURVE_FILE = "step_metrics.csv", "loss.svg"


@dataclass(frozen=True, slots=True)
class Failure:
    reason: JobFailure
    message: str
    line: int | None = None


@dataclass
class Measuring:
    """An evaluation that is under way."""

    uid: str | None
    """None: of the base alone."""
    pieces: list[Sequence[Example]]
    done: list[Evaluation] = field(default_factory=list)

    @property
    def next_tokens(self) -> int:
        return sum(len(example.ids) for example in self.pieces[len(self.done)])


@dataclass
class Loaded:
    """What is known of a job once its data was read."""

    settings: JobSettings
    origin: Origin
    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    dataset: Dataset
    steps: int
    interval: int
    initial: InitialAdapter | None

    @classmethod
    def of(
        cls, settings: JobSettings, dataset: Dataset, initial: InitialAdapter | None, base: str, numerics: str
    ) -> Loaded:
        training = tuple(Example(item.ids, item.counted) for item in dataset.training)
        validation = tuple(Example(item.ids, item.counted) for item in dataset.validation)
        steps = total_steps(settings, len(training))
        per_step = dataset.train_tokens * settings.batch_size / len(training)
        interval = evaluation_interval(steps, per_step, sum(len(example.ids) for example in validation))
        data = f"{dataset.digest} {dataset.validation_digest} {len(training)}"
        data += f" {initial.digest}" if initial is not None else ""
        origin = Origin.of(base, settings, data, numerics)
        return cls(settings, origin, training, validation, dataset, steps, interval, initial)


class LiveJob:
    def __init__(self, order: JobOrder, files: JobFiles, since_unix_s: float) -> None:
        self.order, self.files, self.since_unix_s = order, files, since_unix_s
        self.state = JobState.VALIDATING
        self.failure: Failure | None = None
        self.queued_for: tuple[str, str] | None = None
        """Reason and message while it waits."""
        self.loaded: Loaded | None = None
        self.step = self.skipped = 0
        self.counters = Counters()
        self.rows: list[Row] = []
        self.measuring: Measuring | None = None
        self.checkpoints: list[Checkpoint] = []
        self.result: AdapterFolder | None = None
        self.modules: tuple[str, ...] = ()
        self.checkpointed_s = 0.0
        self.entered_s, self.entered_step, self.entered_tokens = 0.0, 0, 0
        """When this process began to train it, and how far it was then."""
        self.stopped_early = False
        self.restored_rows = 0
        """Complete rows that the checkpoint had from which it continued."""

    @property
    def uid(self) -> str:
        return self.order.uid

    @property
    def active(self) -> bool:
        """Whether the engine has it."""
        return self.state in (JobState.TRAINING, JobState.EVALUATING)

    @property
    def progress(self) -> int:
        return progress(self.step, self.rows)

    def _known(self) -> Loaded:
        assert self.loaded is not None, "the job's data was not read yet"
        return self.loaded

    # --- begin and end --------------------------------------------------------------------

    def enter(self, engine: Engine, now_s: float) -> None:
        """Begins, or continues from the newest checkpoint. Raises what `Engine.add` raises."""
        known = self._known()
        self.checkpoints = read_checkpoints(self.files.folder)
        newest = self.checkpoints[-1] if self.checkpoints else None
        initial = None if newest or known.initial is None else known.initial.tensors
        engine.add(self.uid, known.settings, known.training, state=newest.state() if newest else None, initial=initial)
        if newest is not None:
            record = newest.record
            self.step, self.skipped, self.rows = record.step, record.skipped_steps, list(record.rows)
            self.counters = record.counters.model_copy(update={"restarts": record.counters.restarts + 1})
        self.restored_rows = len(self.complete_rows)
        self.modules = _short_names(engine, known.settings)
        self.state, self.queued_for, self.checkpointed_s = JobState.TRAINING, None, now_s
        self.entered_s, self.entered_step, self.entered_tokens = now_s, self.step, self.counters.trained_tokens
        self.stopped_early = self.counters.best.stops(self.order.stopping)
        self.plan_measurement()

    def leave(self, engine: Engine) -> None:
        engine.remove(self.uid)
        self.measuring = None

    # --- steps ----------------------------------------------------------------------------

    def after_step(self, report: StepReport) -> None:
        """Counts a finished step. The job may have diverged afterwards."""
        self.step, self.skipped = report.step, self.skipped + report.skipped
        self.counters = self.counters.model_copy(
            update={
                "trained_tokens": self.counters.trained_tokens + report.tokens,
                "broken": broken_after(self.counters.broken, report.loss, report.skipped),
            }
        )
        accuracy = report.correct / report.counted if report.counted else math.nan
        self.rows.append(Row(step=report.step, train_loss=finite(report.loss), train_accuracy=finite(accuracy)))
        if self.counters.broken >= BROKEN_STEPS:
            self.fail(JobFailure.DIVERGED, _diverged(self.step, report.loss, self._known().settings.learning_rate))
        else:
            self.plan_measurement()

    def computed(self, tokens: int, seconds: float, *, trained: bool) -> None:
        """Counts what the job has used."""
        self.counters = self.counters.model_copy(
            update={
                "computed_tokens": self.counters.computed_tokens + tokens * trained,
                "trainer_seconds": self.counters.trainer_seconds + seconds,
            }
        )

    def fail(self, reason: JobFailure, message: str, line: int | None = None) -> None:
        self.state, self.failure = JobState.FAILED, Failure(reason, message[:1024], line)

    @property
    def trained(self) -> bool:
        """Whether no step is left."""
        return self.stopped_early or (self.loaded is not None and self.step >= self.loaded.steps)

    # --- evaluation -----------------------------------------------------------------------

    @property
    def complete_rows(self) -> list[Row]:
        """The rows to which nothing is added any more: without the last one while its evaluation is due."""
        return self.rows[:-1] if self._unmeasured and not self.state.ended else self.rows

    @property
    def _unmeasured(self) -> bool:
        known = self.loaded
        if known is None or not known.validation or not self.rows or self.counters.base_loss is None:
            return False
        return is_due(self.step, known.steps, known.interval) and self.rows[-1].valid_accuracy is None

    def plan_measurement(self) -> None:
        """Begins the evaluation that is due now, if there is one and it was not made."""
        if self._known().validation and self.counters.base_loss is None:
            self._measure(None)
        elif self._unmeasured:
            self._measure(self.uid)

    def _measure(self, uid: str | None) -> None:
        self.measuring = Measuring(uid, list(slices_of(self._known().validation)))
        self.state = JobState.EVALUATING if uid is not None and self.trained else JobState.TRAINING

    def after_evaluation(self, evaluation: Evaluation) -> bool:
        """Takes the next piece. Returns whether the evaluation is complete and made a new best result."""
        assert self.measuring is not None
        self.measuring.done.append(evaluation)
        if len(self.measuring.done) < len(self.measuring.pieces):
            return False
        done, of_base = self.measuring.done, self.measuring.uid is None
        self.measuring = None
        counted = sum(item.counted for item in done)
        loss, accuracy = sum(item.loss_sum for item in done) / counted, sum(item.correct for item in done) / counted
        if of_base:
            self.rows = [*with_validation([], 0, loss, accuracy), *self.rows]
            self.counters = self.counters.model_copy(update={"base_loss": loss})
            self.plan_measurement()
            return False
        return self._measured(loss, accuracy)

    def _measured(self, loss: float, accuracy: float) -> bool:
        self.rows = with_validation(self.rows, self.step, loss, accuracy)
        best = self.counters.best.after(loss, accuracy, self.step, self.order.stopping)
        improved = best.step == self.step
        self.counters = self.counters.model_copy(
            update={"valid_loss": finite(loss), "valid_accuracy": finite(accuracy), "best": best}
        )
        self.stopped_early = best.stops(self.order.stopping)
        return improved and self.order.stopping is not None

    # --- files ----------------------------------------------------------------------------

    def write_checkpoint(self, engine: Engine, now_s: float, now_unix_s: float) -> None:
        """Writes one unless the newest is of this step, and deletes those that are not kept."""
        self.checkpointed_s = now_s
        if self.checkpoints and self.checkpoints[-1].record.step == self.step and self._says_all(self.checkpoints[-1]):
            return
        made = write_checkpoint(
            self.files.folder, self._known().origin, engine.state(self.uid), self.counters, self.rows, now_unix_s
        )
        self.checkpoints = [*(found for found in self.checkpoints if found.name != made.name), made]
        self.files.save(made.name)
        for old in superseded(self.checkpoints, self.order.checkpoints.keep, self.counters.best.step):
            self.checkpoints.remove(old)
            _delete(old.path)
            self.files.drop(old.name)

    def _says_all(self, newest: Checkpoint) -> bool:
        return newest.record.rows == tuple(self.rows)

    def write_pictures(self) -> None:
        """The loss curve as numbers and as a picture."""
        self._write(METRICS_FILE, as_csv(self.rows))
        self._write(CURVE_FILE, loss_curve(self.order.display, self.rows))
        self.files.save(METRICS_FILE, CURVE_FILE)

    def _write(self, name: str, text: str) -> None:
        path = self.files.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        writing = path.with_name(f".writing-{name}")
        writing.write_text(text, encoding="utf-8")
        writing.replace(path)

    def write_result(self, engine: Engine, base: str) -> None:
        """Writes the adapter: the best one with early stopping, else the last one."""
        best = self.counters.best
        tensors = engine.adapter(self.uid)
        kept = next((found for found in self.checkpoints if found.record.step == best.step), None)
        if self.order.stopping is not None and kept is not None and best.step != self.step:
            tensors = adapter_of(kept.state())
            self.counters = self.counters.model_copy(update={"valid_loss": best.loss, "valid_accuracy": best.accuracy})
        path = self.files.folder / ADAPTER
        known = self._known()
        chat_files = known.initial.chat_files if known.initial is not None else {}
        self.result = write_adapter(path, tensors, known.settings, self.modules, base, chat_files)
        self.files.save(ADAPTER)
        self.state = JobState.SUCCEEDED


def slices_of(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return list(slices(examples, EVALUATION_TOKENS))


def _short_names(engine: Engine, settings: JobSettings) -> tuple[str, ...]:
    """The last parts of the names of the changed layers, or the full names where an unchanged layer has such an end."""
    full = engine.targets(settings)
    ends = tuple(sorted({name.rpartition(".")[2] for name in full}))
    return ends if set(engine.targets(replace(settings, target_modules=ends))) == set(full) else full


def _diverged(step: int, loss: float, rate: float) -> str:
    return (
        f"Loss or gradient was no usable number in {BROKEN_STEPS} steps in a row, until step {step} (loss {loss:g}). "
        f"Create another job with a lower training.learningRate than {rate:g}, or look for wrong examples."
    )


def _delete(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
