"""Random packed adapters, and what they add to a row by the formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.weights.layout import lay_out
from lorapool_runtime.weights.targets import TargetGroup


class RandomAdapter:
    """ranks: one per linear layer. dtype: the type of the slots; bfloat16 as its 16-bit patterns."""

    def __init__(
        self,
        groups: Sequence[TargetGroup],
        ranks: Sequence[int],
        rng: np.random.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout = lay_out(tuple(groups), tuple(ranks), dtype.itemsize)
        values = torch.from_numpy(rng.standard_normal(self.layout.elements).astype(np.float32))
        self.tensor = values.to(dtype)  # [elements]
        bits = {torch.bfloat16: torch.uint16}.get(dtype, dtype)
        self.buffer = self.tensor.view(bits).numpy()

    def a(self, linear: int) -> Tensor:
        """float32 [rank, in]"""
        piece = self.layout.linears[linear]
        return self._part(piece.a_at, piece.rank, piece.in_features)

    def b(self, linear: int) -> Tensor:
        """float32 [rank, out]"""
        piece = self.layout.linears[linear]
        return self._part(piece.b_at, piece.rank, piece.out_features)

    def delta(self, linear: int, x: Tensor) -> Tensor:
        """x: [..., in] -> float32 [..., out]"""
        return x.float() @ self.a(linear).T @ self.b(linear)

    def _part(self, at: int, rows: int, width: int) -> Tensor:
        return self.tensor[at : at + rows * width].view(rows, width).float()
