"""One job in training: its weights, its optimiser, and how far it is. Nothing in here knows of another job."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorapool_trainer.engine.dropout import Dropout, row_keys
from lorapool_trainer.engine.heads import SegmentLoss
from lorapool_trainer.engine.lora import LoraRows, LoraWeights
from lorapool_trainer.engine.pack import Segment
from lorapool_trainer.engine.plan import Offer, batch_of, micro_batches
from lorapool_trainer.engine.reports import JobState, StepReport
from lorapool_trainer.engine.settings import Example, JobSettings, learning_rate, total_steps

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingJob:
    def __init__(self, uid: str, settings: JobSettings, examples: Sequence[Example], weights: LoraWeights) -> None:
        self.uid, self.settings, self.weights = uid, settings, weights
        self._examples = tuple(examples)
        self._optimizer = torch.optim.AdamW(
            weights.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.steps = total_steps(settings, len(self._examples))
        self._step = self._updates = self._skipped = self._in_a_row = self._trained_tokens = 0
        self._begin_step()

    def _begin_step(self) -> None:
        """Puts the cursor at the first micro-batch of the current step, whatever was computed of it."""
        self.weights.zero_grad()
        self._losses: list[SegmentLoss] = []
        self._cursor = 0
        self._batch: tuple[int, ...] = ()
        if self._step < self.steps:
            self._batch = batch_of(self.settings, len(self._examples), self._step)
        self._tokens = [len(self._examples[index].ids) for index in self._batch]
        self._groups = micro_batches(self._tokens, self.settings.micro_batch_tokens)
        self.counted = sum(self._examples[index].counted_tokens for index in self._batch)

    restart_step = _begin_step

    def offer(self) -> Offer:
        remaining = self._groups[self._cursor :]
        return Offer(self.uid, tuple(sum(self._tokens[at] for at in group) for group in remaining))

    def next_micro_batches(self, count: int) -> list[tuple[Example, ...]]:
        groups = self._groups[self._cursor : self._cursor + count]
        return [tuple(self._examples[self._batch[at]] for at in group) for group in groups]

    def lora_rows(self, segment: Segment, ahead: int, device: torch.device) -> LoraRows:
        """ahead: how many micro-batches of this job precede the segment in the cycle."""
        if not self.settings.dropout:
            return LoraRows(segment.begin, segment.end, self.weights)
        indices = [self._batch[at] for at in self._groups[self._cursor + ahead]]
        examples = [i for i in indices for _ in self._examples[i].ids]
        positions = [at for i in indices for at in range(len(self._examples[i].ids))]
        keys = row_keys(
            self.settings.seed,
            self._step,
            torch.tensor(examples, device=device),
            torch.tensor(positions, device=device),
        )
        return LoraRows(segment.begin, segment.end, self.weights, Dropout(self.settings.dropout, keys))

    def advance(self, losses: Sequence[SegmentLoss]) -> StepReport | None:
        """Takes the losses of the next micro-batches, whose gradients are in the buffers; ends the step after the last,
        or as soon as one is not finite."""
        self._losses += losses
        self._cursor += len(losses)
        if self._cursor < len(self._groups) and all(loss.finite for loss in losses):
            return None
        return self._end_step()

    def _end_step(self) -> StepReport:
        rate = learning_rate(self.settings, self._step, self.steps)
        norm = self._clipped_norm() if all(loss.finite for loss in self._losses) else math.nan
        if math.isfinite(norm):
            self._update(rate)
        skipped = not math.isfinite(norm)
        self._skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self._step += 1
        self._trained_tokens += sum(self._tokens)
        report = self._report(rate, norm)
        self._begin_step()
        return report

    def _clipped_norm(self) -> float:
        """Scales the gradients down to `max_grad_norm` and returns the norm that they had."""
        limit = self.settings.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.weights.parameters(), limit))

    def _update(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._updates += 1

    def _report(self, rate: float, norm: float) -> StepReport:
        return StepReport(
            uid=self.uid,
            step=self._step,
            loss=sum(loss.loss_sum for loss in self._losses) / self.counted if self.counted else math.nan,
            counted=self.counted,
            correct=sum(loss.correct for loss in self._losses),
            tokens=sum(self._tokens),
            learning_rate=rate,
            grad_norm=norm,
            skipped=self._in_a_row > 0,
            consecutive_skips=self._in_a_row,
        )

    def state(self) -> JobState:
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.named().items():
            tensors[name] = _copied(weight)
            moments = self._optimizer.state.get(weight, {})
            tensors |= {f"{name}.{kind}": _copied(moments.get(kind, torch.zeros_like(weight))) for kind in _MOMENTS}
        return JobState(tensors, self._step, self._updates, self._skipped, self._in_a_row, self._trained_tokens)

    def restore(self, state: JobState) -> None:
        """Continues from the state, whose weights this job has already."""
        self._step, self._updates, self._skipped = state.step, state.updates, state.skipped_steps
        self._in_a_row, self._trained_tokens = state.consecutive_skips, state.trained_tokens
        if state.updates:
            for name, weight in self.weights.named().items():
                self._optimizer.state[weight] = _adam_state(state, name, weight)
        self._begin_step()


def weights_in(state: JobState) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in state.tensors.items() if not name.endswith(_MOMENTS)}


def _adam_state(state: JobState, name: str, weight: nn.Parameter) -> dict[str, Tensor]:
    moments = {kind: state.tensors[f"{name}.{kind}"].to(weight.device, copy=True) for kind in _MOMENTS}
    return {"step": torch.tensor(float(state.updates)), **moments}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
