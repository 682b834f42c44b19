"""Lays the examples of a cycle out in one row of tokens, in segments: one for each micro-batch, in the jobs' order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapool_trainer.engine.settings import Example


@dataclass(frozen=True, slots=True)
class Segment:
    """One micro-batch: rows [begin, end) of the cycle."""

    begin: int
    end: int
    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class PackedRow:
    ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows], from 0 in each sequence
    lengths: tuple[int, ...]
    """Of each sequence; the padding rows behind them belong to none."""
    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])


def pack(micro_batches: Sequence[Sequence[Example]], rows: int, device: torch.device) -> PackedRow:
    """Packs the examples one after the other and pads with token 0 up to `rows`, or not if they are as many."""
    segments: list[Segment] = []
    for examples in micro_batches:
        begin = segments[-1].end if segments else 0
        size = sum(len(example.ids) for example in examples)
        segments.append(Segment(begin, begin + size, tuple(examples)))
    sequences = [example.ids for segment in segments for example in segment.examples]
    padding = max(0, rows - (segments[-1].end if segments else 0))
    ids = [token for sequence in sequences for token in sequence] + [0] * padding
    positions = [at for sequence in sequences for at in range(len(sequence))] + [0] * padding
    return PackedRow(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        tuple(len(sequence) for sequence in sequences),
        tuple(segments),
    )


def predictions(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """The rows of a segment, counted from its begin, that predict a counted token, and these tokens."""
    rows: list[int] = []
    labels: list[int] = []
    begin = 0
    for example in examples:
        counted = [at for at in range(1, len(example.ids)) if example.counted[at]]
        rows += [begin + at - 1 for at in counted]
        labels += [example.ids[at] for at in counted]
        begin += len(example.ids)
    return rows, labels
