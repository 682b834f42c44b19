"""The loss of each micro-batch, computed one after the other from the trunk's output, and its gradient there.

The output layer computes counted positions only, so that the logits of one micro-batch are in memory at a time. A loss
or a gradient that is not finite is known before the trunk's backward pass: the rows of its job get a gradient of zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorapool_trainer.engine.base import FrozenBase
from lorapool_trainer.engine.pack import Segment, predictions


@dataclass(frozen=True, slots=True)
class SegmentLoss:
    loss_sum: float
    """In nats, over the counted tokens of the segment."""
    counted: int
    correct: int
    finite: bool
    """Whether the loss and its gradient are."""


def loss_and_gradient(
    base: FrozenBase, output: Any, segment: Segment, divisor: int, gradient: Tensor | None
) -> SegmentLoss:
    """Computes a segment's loss. Writes the gradient of loss_sum / divisor into the segment's rows of `gradient`,
    [1, rows, hidden], where there is one."""
    rows, labels = predictions(segment.examples)
    if not rows:
        return SegmentLoss(0.0, 0, 0, True)
    at = torch.tensor(rows, device=base.device) + segment.begin
    hidden = output.last_hidden_state.detach()[:, at].requires_grad_(gradient is not None)
    logits = base.logits(output, hidden).float()
    wanted = torch.tensor(labels, device=base.device)
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    finite = math.isfinite(loss.item())
    if gradient is not None and finite:
        (own,) = torch.autograd.grad(loss / divisor, hidden)
        finite = bool(own.isfinite().all())
        gradient[:, at] = own
    correct = int((logits.detach().argmax(-1) == wanted).sum())
    return SegmentLoss(loss.item(), len(labels), correct, finite)
