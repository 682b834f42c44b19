"""Decode attention on a GPU: writes the keys and values of one new token per row and computes its attention.

Serves the decoding rows of a mixed step and whole captured steps. It never reads the values of its three tables on the
host, so a CUDA graph can capture it.
"""

from __future__ import annotations

from torch import Tensor

from lorapool_runtime.engines.torch.kernels.triton_attention import paged_attend, paged_write
from lorapool_runtime.engines.torch.model.kv_pool import KVPool


class TritonDecode:
    def __init__(self, pool: KVPool, positions: Tensor, contexts: Tensor, tables: Tensor) -> None:
        """positions: int32 [rows], where the new token is stored (block * block_size + offset; -1: it is not stored);
        contexts: int32 [rows], tokens including the new one (0: a padding row); tables: int32 [rows, blocks]."""
        self._pool, self._positions, self._contexts, self._tables = pool, positions, contexts, tables

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q: [heads, rows, head_dim], k, v: [kv_heads, rows, head_dim] -> [rows, heads, head_dim]."""
        keys, values = self._pool.rows(layer)
        paged_write(keys, values, self._positions, k.transpose(0, 1), v.transpose(0, 1))
        q, size = q.transpose(0, 1), self._pool.block_size
        out: Tensor = paged_attend(
            q, keys, values, self._tables, self._contexts, size, scale, window or 0, softcap or 0.0
        )
        return out
