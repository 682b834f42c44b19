"""One new token per row on a GPU: its keys and values written, its attention computed, by `kernels_attention`.

`attention` uses it for the decoding rows of a mixed step, `decode_graph` for a whole captured step. The three tables
stay where they are: nothing here looks at their values.
"""

from __future__ import annotations

from torch import Tensor

from lorapool_runtime.engines.torch.kernels.triton_attention import paged_attend, paged_write
from lorapool_runtime.engines.torch.model.kv_pool import KVPool


class TritonDecode:
    def __init__(self, pool: KVPool, places: Tensor, contexts: Tensor, tables: Tensor) -> None:
        """places: int32 [rows], where the new token goes (block * block_size + offset; -1: nowhere); contexts: int32
        [rows], tokens with the new one (0: a padding row); tables: int32 [rows, blocks]."""
        self._pool, self._places, self._contexts, self._tables = pool, places, contexts, tables

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q: [heads, rows, head_dim], k, v: [kv_heads, rows, head_dim] -> [rows, heads, head_dim]."""
        keys, values = self._pool.rows(layer)
        paged_write(keys, values, self._places, k.transpose(0, 1), v.transpose(0, 1))
        q, size = q.transpose(0, 1), self._pool.block_size
        out: Tensor = paged_attend(
            q, keys, values, self._tables, self._contexts, size, scale, window or 0, softcap or 0.0
        )
        return out
