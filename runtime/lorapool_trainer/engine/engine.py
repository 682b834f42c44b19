"""The engine: adds and removes jobs, computes cycles of their micro-batches on one base, evaluates, measures memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorapool_trainer.engine.base import FrozenBase, load_base
from lorapool_trainer.engine.exactness import NO_PADDING, measure_padding
from lorapool_trainer.engine.heads import SegmentLoss, loss_and_gradient
from lorapool_trainer.engine.job import TrainingJob, weights_in
from lorapool_trainer.engine.lora import (
    LoraCycle,
    LoraRows,
    LoraWeights,
    from_peft_names,
    initial_weights,
    peft_tensors,
    weights_from,
)
from lorapool_trainer.engine.memory import (
    BYTES_PER_PARAMETER,
    Admission,
    MemoryFigures,
    admission,
    peak_bytes,
    used_bytes,
)
from lorapool_trainer.engine.pack import PackedRow, pack
from lorapool_trainer.engine.plan import Offer, Take, micro_batches, plan_cycle
from lorapool_trainer.engine.reports import CycleReport, Evaluation, JobState
from lorapool_trainer.engine.settings import Example, JobSettings, Numerics
from lorapool_trainer.engine.targets import chosen_targets

EVALUATION_TOKENS = 1024
"""Evaluations are computed in chunks of so many tokens, whatever the budget is: their bits do not depend on it."""


class Engine:
    """Not thread-safe: one thread makes all calls."""

    def __init__(self, base: FrozenBase, numerics: Numerics, token_budget: int) -> None:
        self.base, self.numerics, self.token_budget = base, numerics, token_budget
        exact = numerics is Numerics.EXACT
        most = max(token_budget, EVALUATION_TOKENS)
        self.padding = measure_padding(base.linears.values(), most) if exact else NO_PADDING
        self._jobs: dict[str, TrainingJob] = {}
        self._cycle = LoraCycle()
        self._fixed = max(0, used_bytes(base.device) - base.weight_bytes)
        self._activations: tuple[int, int] | None = None  # token budget, bytes

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        numerics: Numerics = Numerics.EXACT,
        token_budget: int = 1024,
    ) -> Engine:
        """Loads the base. Raises UnsupportedBaseError, and OSError or ValueError for a broken folder."""
        return cls(load_base(folder, dtype=dtype, device=torch.device(device)), numerics, token_budget)

    def targets(self, settings: JobSettings) -> tuple[str, ...]:
        """Full names of the linear layers that a job would train. Raises TargetError."""
        return chosen_targets(settings.target_modules, tuple(self.base.linears))

    def add(
        self,
        uid: str,
        settings: JobSettings,
        examples: Sequence[Example],
        *,
        state: JobState | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a job: a new one, one that continues from a state, or one that begins with the weights of an adapter.

        initial: tensors by their names in peft's file. Raises TargetError, and ValueError for examples that cannot be
        computed, for tensors that do not fit, and for a uid that is present.
        """
        if uid in self._jobs:
            raise ValueError(f"the job {uid} is present already")
        check_examples(examples, self.base.vocab_size, self.base.max_positions)
        weights = self._weights(settings, weights_in(state) if state else from_peft_names(initial or {}))
        job = TrainingJob(uid, settings, examples, weights)
        if state is not None:
            job.restore(state)
        self._hook(weights)
        self._jobs[uid] = job

    def _weights(self, settings: JobSettings, tensors: Mapping[str, Tensor]) -> LoraWeights:
        linears = {name: self.base.linears[name] for name in self.targets(settings)}
        scale = settings.alpha / settings.rank
        if tensors:
            return weights_from(tensors, linears, settings.rank, scale)
        return initial_weights(linears, settings.rank, scale, settings.seed)

    def _hook(self, weights: LoraWeights) -> None:
        for name in weights.pairs:
            self._cycle.hook(name, self.base.linears[name])

    def remove(self, uid: str) -> None:
        """Forgets a job, between any two cycles. Raises KeyError for an unknown one."""
        del self._jobs[uid]

    def offer(self, uid: str) -> Offer:
        return self._jobs[uid].offer()

    def run(self, takes: Sequence[Take]) -> CycleReport:
        """Computes one cycle: the taken micro-batches, and the step of each job whose batch is complete."""
        try:
            return self._run([(self._jobs[take.uid], take.micro_batches) for take in takes])
        except torch.OutOfMemoryError:
            if self.token_budget <= max(self._jobs[take.uid].offer().tokens[0] for take in takes) // 2:
                raise  # less than the largest micro-batch by itself is not possible
            self._after_out_of_memory(takes)
            return CycleReport({}, 0, (), out_of_memory=True)

    def _after_out_of_memory(self, takes: Sequence[Take]) -> None:
        for take in takes:
            self._jobs[take.uid].restart_step()
        self.token_budget //= 2
        torch.cuda.empty_cache()

    def _run(self, taken: Sequence[tuple[TrainingJob, int]]) -> CycleReport:
        batches = [(job, ahead, b) for job, n in taken for ahead, b in enumerate(job.next_micro_batches(n))]
        row = self._pack([batch for _, _, batch in batches])
        rows = [
            job.lora_rows(segment, ahead, self.base.device)
            for (job, ahead, _), segment in zip(batches, row.segments, strict=True)
        ]
        jobs = [job for job, _, _ in batches]
        losses = self._forward_and_backward(row, rows, jobs)
        steps = [job.advance([loss for own, loss in zip(jobs, losses, strict=True) if own is job]) for job, _ in taken]
        return CycleReport(_tokens(jobs, row), row.rows, tuple(step for step in steps if step is not None))

    def _pack(self, batches: Sequence[Sequence[Example]]) -> PackedRow:
        tokens = sum(len(example.ids) for batch in batches for example in batch)
        return pack(batches, self.padding.rows(tokens), self.base.device)

    def _forward_and_backward(
        self, row: PackedRow, rows: Sequence[LoraRows], jobs: Sequence[TrainingJob]
    ) -> list[SegmentLoss]:
        with self._cycle.computing(rows):
            output = self.base.hidden(row)
        hidden: Tensor = output.last_hidden_state
        gradient = torch.zeros_like(hidden)
        losses = [
            loss_and_gradient(self.base, output, segment, job.counted, gradient)
            for job, segment in zip(jobs, row.segments, strict=True)
        ]
        broken = {job.uid for job, loss in zip(jobs, losses, strict=True) if not loss.finite}
        for job, segment in zip(jobs, row.segments, strict=True):
            if job.uid in broken:
                gradient[:, segment.begin : segment.end] = 0
        if hidden.requires_grad:
            hidden.backward(gradient)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return losses

    def evaluate(self, uid: str | None, examples: Sequence[Example]) -> Evaluation:
        """The loss of a job's present weights, or of the base alone. Raises ValueError for examples out of bounds."""
        check_examples(examples, self.base.vocab_size, self.base.max_positions)
        groups = micro_batches([len(example.ids) for example in examples], EVALUATION_TOKENS)
        weights = None if uid is None else self._jobs[uid].weights
        losses = [self._evaluated([examples[at] for at in group], weights) for group in groups]
        return Evaluation(
            sum(loss.loss_sum for loss in losses),
            sum(loss.counted for loss in losses),
            sum(loss.correct for loss in losses),
            sum(len(example.ids) for example in examples),
        )

    @torch.no_grad()
    def _evaluated(self, examples: Sequence[Example], weights: LoraWeights | None) -> SegmentLoss:
        row = self._pack([examples])
        (segment,) = row.segments
        rows = [] if weights is None else [LoraRows(segment.begin, segment.end, weights)]
        with self._cycle.computing(rows):
            output = self.base.hidden(row)
        return loss_and_gradient(self.base, output, segment, 1, None)

    def adapter(self, uid: str) -> dict[str, Tensor]:
        """float32 copies on the CPU by peft's names: `base_model.model.<module>.lora_A.weight` [rank, in] and
        `….lora_B.weight` [out, rank]."""
        return peft_tensors(self._jobs[uid].weights)

    def state(self, uid: str) -> JobState:
        return self._jobs[uid].state()

    def memory(self) -> MemoryFigures:
        """The first call, and the first after a change of the token budget, computes a step as large as the budget."""
        if self._activations is None or self._activations[0] != self.token_budget:
            self._activations = self.token_budget, peak_bytes(self.base.device, self._warm_up)
        return self.memory_as_known()

    def memory_as_known(self) -> MemoryFigures:
        """As `memory`, but never measures: activations are 0 before the first measurement."""
        activations = self._activations[1] if self._activations is not None else 0
        present = sum(_parameters(job.weights) for job in self._jobs.values())
        return MemoryFigures(self.base.weight_bytes, self._fixed, present * BYTES_PER_PARAMETER, activations)

    def admits(self, settings: JobSettings, limit_bytes: int) -> Admission:
        """Whether a job fits in addition to the present ones. Raises TargetError."""
        linears = [self.base.linears[name] for name in self.targets(settings)]
        parameters = settings.rank * sum(linear.in_features + linear.out_features for linear in linears)
        return admission(self.memory(), parameters, limit_bytes)

    def _warm_up(self) -> None:
        """One cycle of a job of its own that fills the token budget and counts every token."""
        settings = JobSettings(rank=1, max_steps=1, batch_size=self.token_budget)
        size = max(2, min(settings.micro_batch_tokens, self.token_budget, self.base.max_positions))
        example = Example((0,) * size, (True,) * size)
        job = TrainingJob("", settings, [example] * max(1, self.token_budget // size), self._weights(settings, {}))
        self._hook(job.weights)
        self._run([(job, take.micro_batches) for take in plan_cycle([job.offer()], self.token_budget)])


def check_examples(examples: Sequence[Example], vocab_size: int, max_positions: int) -> None:
    """Raises ValueError for the first example that the base cannot compute or that teaches nothing."""
    if not examples:
        raise ValueError("there are no examples")
    for number, example in enumerate(examples, 1):
        tokens = len(example.ids)
        if tokens != len(example.counted):
            raise ValueError(f"example {number} has {tokens} tokens but {len(example.counted)} marks")
        if tokens > max_positions:
            raise ValueError(f"example {number} has {tokens} tokens; the base computes at most {max_positions}")
        if not example.counted_tokens:
            raise ValueError(f"example {number} has no counted token")
        if not all(0 <= token < vocab_size for token in example.ids):
            raise ValueError(f"example {number} has a token outside of the vocabulary of {vocab_size}")


def _tokens(jobs: Sequence[TrainingJob], row: PackedRow) -> dict[str, int]:
    tokens = dict.fromkeys((job.uid for job in jobs), 0)
    for job, segment in zip(jobs, row.segments, strict=True):
        tokens[job.uid] += segment.tokens
    return tokens


def _parameters(weights: LoraWeights) -> int:
    return sum(weight.numel() for weight in weights.parameters())
