"""The paged memory of keys and values. `scheduling.blocks` decides which sequence holds which block.

It is one tensor, so that wiping blocks is one operation over all layers. Only the engine thread uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapool_runtime.engines.torch.kernels.memory import lazy_zeros
from lorapool_runtime.engines.torch.scheduling.blocks import NULL_BLOCK
from lorapool_runtime.engines.torch.transfers import to_device

_CHECKED_AT_ONCE = 32
"""Blocks that are copied for the check at one time: 64 MiB of an 8B Llama's, where a long prompt fills a gigabyte."""


class KVPool:
    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.row = kv_heads * head_dim
        # [keys|values, layers, blocks + the null block, block_size * kv_heads * head_dim]
        self.data = lazy_zeros((2, layers, blocks + 1, block_size * self.row), dtype=dtype, device=device)
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self._keys = [self.data[0, layer] for layer in range(layers)]
        self._values = [self.data[1, layer] for layer in range(layers)]
        self._key_rows = [t.view(-1, kv_heads, head_dim) for t in self._keys]
        self._value_rows = [t.view(-1, kv_heads, head_dim) for t in self._values]

    @staticmethod
    def block_bytes(*, layers: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * head_dim * block_size * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores new tokens.

        positions: [tokens], block * block_size + offset; keys, values: [tokens, kv_heads, head_dim].
        """
        self._key_rows[layer].index_copy_(0, positions, keys)
        self._value_rows[layer].index_copy_(0, positions, values)

    def gather(self, layer: int, blocks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Reads whole blocks. blocks: [rows * n] block numbers.

        Returns keys and values [rows, kv_heads, n * block_size, head_dim], strided.
        """
        shape = (rows, -1, self.kv_heads, self.head_dim)
        keys = self._keys[layer].index_select(0, blocks).view(shape).transpose(1, 2)
        values = self._values[layer].index_select(0, blocks).view(shape).transpose(1, 2)
        return keys, values

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of all keys and values, [blocks * block_size, kv_heads, head_dim], for a paged kernel."""
        return self._key_rows[layer], self._value_rows[layer]

    def wipe(self, blocks: tuple[int, ...]) -> None:
        """Zeroes blocks in all layers, so that no value of their last holder is read, not even as NaN times zero."""
        if NULL_BLOCK in blocks:
            raise ValueError("the null block is never allocated and must stay zero")
        if blocks:
            self.data.index_fill_(2, to_device(blocks, torch.int64, self.data.device), 0)

    def are_finite(self, blocks: list[int]) -> Tensor:
        """For each block, whether all its keys and values in all layers are finite: bool [blocks] on the pool's "
        "device."""
        if not blocks:
            return torch.empty(0, dtype=torch.bool, device=self.data.device)
        numbers = to_device(blocks, torch.int64, self.data.device)
        # NaN and infinity survive a sum, which is the cheapest check; an overflow only loses one reuse of a block
        sums = [
            self.data.index_select(2, numbers[at : at + _CHECKED_AT_ONCE]).sum(dim=(0, 1, 3), dtype=torch.float32)
            for at in range(0, len(blocks), _CHECKED_AT_ONCE)
        ]
        return torch.isfinite(torch.cat(sums))
