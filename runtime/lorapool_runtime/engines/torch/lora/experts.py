"""LoRA on the experts of a mixture: torch products for each adapter's rows, expert by expert.

    h = act(x (G_e + A_e^T B_e)^T) ...      A_e: [rank, in]   B_e: [rank, out], alpha/r folded in, e: the row's expert

An adapter changes the joined matrix of gate and up, or the two halves by themselves, as older files have them. Rows
without such an adapter are computed by the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorapool_runtime.engines.torch.lora.dispatch import SlotRows
from lorapool_runtime.engines.torch.lora.layer import LoraBatch
from lorapool_runtime.weights.targets import TargetGroup


@dataclass(frozen=True, slots=True)
class _Delta:
    """One member's matrices of an adapter, and the columns of the product that they change."""

    a: Tensor  # [experts, rank, in]
    b: Tensor  # [experts, rank, columns]
    columns: slice

    def add(self, expert: int, x: Tensor, y: Tensor) -> None:
        """x: [rows, in]; y: [rows, out], added to in place."""
        added = (x.float() @ self.a[expert].T.float()) @ self.b[expert].float()
        y[:, self.columns] += added.to(y.dtype)


class LoraExperts:
    """Takes the place of the forward of one module of experts.

    groups: the numbers of the groups of `gate_up_proj` and `down_proj`.
    """

    def __init__(self, experts: nn.Module, groups: tuple[tuple[int, TargetGroup], ...], batch: LoraBatch) -> None:
        self._experts: Any = experts
        self._stock: Callable[..., Tensor] = experts.forward
        self._groups, self._batch = groups, batch
        experts.forward = self.forward  # parents read other attributes of the module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [rows, hidden]; top_k_index, top_k_weights: [rows, chosen experts] -> [rows, hidden]"""
        adapted = [
            (segment, deltas) for segment in self._batch.segments if any(deltas := self._deltas_of(segment.slot))
        ]
        if not adapted:
            return self._stock(hidden_states, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        plain = _other_rows(hidden_states, [segment for segment, _ in adapted])
        if len(plain):
            out[plain] = self._stock(hidden_states[plain], top_k_index[plain], top_k_weights[plain])
        for segment, (up, down) in adapted:
            rows = slice(segment.begin, segment.end)
            self._add(hidden_states[rows], top_k_index[rows], top_k_weights[rows], up, down, out[rows])
        return out

    def _add(
        self, x: Tensor, index: Tensor, weights: Tensor, up: tuple[_Delta, ...], down: tuple[_Delta, ...], out: Tensor
    ) -> None:
        experts = self._experts
        for expert in sorted(set(index.flatten().tolist())):
            rows, chosen = torch.where(index == expert)
            gated = experts._apply_gate(_product(x[rows], experts.gate_up_proj, expert, up))
            result = _product(gated, experts.down_proj, expert, down)
            out.index_add_(0, rows, (result * weights[rows, chosen, None]).to(out.dtype))

    def _deltas_of(self, slot: int) -> tuple[tuple[_Delta, ...], ...]:
        """Of each group, the deltas of the adapter in that slot."""
        return tuple(tuple(self._of_group(number, group, slot)) for number, group in self._groups)

    def _of_group(self, number: int, group: TargetGroup, slot: int) -> list[_Delta]:
        slots = self._batch.slots
        assert slots is not None
        found, begin = [], 0
        for member, width in enumerate(group.out_features):
            columns = slice(0, width) if member == 0 else slice(begin, begin + width)
            begin = 0 if member == 0 else columns.stop
            if (matrices := slots.member_matrices(number, member, slot)) is not None:
                a, b = (m.view(group.experts, -1, m.shape[1]) for m in matrices)
                found.append(_Delta(a, b, columns))
        return found


def _product(x: Tensor, weight: Tensor, expert: int, deltas: tuple[_Delta, ...]) -> Tensor:
    y = F.linear(x, weight[expert])
    for delta in deltas:
        delta.add(expert, x, y)
    return y


def _other_rows(x: Tensor, segments: list[SlotRows]) -> Tensor:
    """The numbers of the rows outside of all segments, int64."""
    outside = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for segment in segments:
        outside[segment.begin : segment.end] = False
    return outside.nonzero().flatten()
