"""A decode step on a GPU as one captured CUDA graph; the host only adds two small copies.

The batch is padded to one of a few sizes. Each size, with and without LoRA, is captured once at start over tensors at
fixed addresses, and replayed. A padding row has slot -1, context 0 and the null block: it reads and writes nothing.
Captured code must neither read a tensor's value on the host nor have a shape that depends on one; the tests check this
on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.model.attention import LayerAttention
from lorapool_runtime.engines.torch.model.attention_gpu import TritonDecode
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base
from lorapool_runtime.engines.torch.scheduling.blocks import NULL_BLOCK
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan

_TOKEN, _POSITION, _SLOT, _PLACE, _CONTEXT = range(5)
_PADDING = (0, 0, BASE_SLOT, -1, 0)

Step = Callable[[], Tensor]


class Capture(Protocol):
    """Turns a step into its replay, which computes the same tensor from the current contents of its inputs."""

    def __call__(self, step: Step) -> Step: ...


class CudaCapture:
    """CUDA graphs that share one memory pool. The next replay overwrites the tensor that a replay returned."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch declares no types here
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles the kernels and allocates the libraries' workspaces, which a capture does not allow
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The sizes that a batch is padded to: powers of two, and `max_batch`."""
    powers = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return (*powers, max_batch)


class DecodeAttention:
    """`model.attention.Attention` for one token per row."""

    def __init__(self, decode: TritonDecode) -> None:
        self._decode = decode

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        window, softcap = wants.window, wants.softcap
        return self._decode.attend(layer, q[0], k[0], v[0], scale=scale, window=window, softcap=softcap)[None]


class _Staging:
    """The rows of a step in pinned host memory, which must not change while a copy to the device is running."""

    def __init__(self, max_batch: int, width: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.fields = torch.zeros(len(_PADDING), max_batch, dtype=torch.int32, pin_memory=on_cuda)
        self.tables = torch.full((max_batch, width), NULL_BLOCK, dtype=torch.int32, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]  # as above
        self._fields, self._tables = self.fields.numpy(), self.tables.numpy()
        self._held: list[list[int]] = [[] for _ in range(max_batch)]

    def fill(self, chunks: tuple[Chunk, ...], size: int, block_size: int) -> None:
        """Writes the rows of a step, once the last copy from this buffer (begun two steps ago) has ended."""
        if self._copied is not None:
            self._copied.synchronize()
        rows = [_row(chunk, block_size) for chunk in chunks] + [_PADDING] * (size - len(chunks))
        self._fields[:, :size] = np.array(rows, np.int32).T
        for row in range(size):
            table = chunks[row].sequence.block_table if row < len(chunks) else []
            if table != self._held[row]:  # most steps change no block table
                self._tables[row] = NULL_BLOCK
                self._tables[row, : len(table)] = table
                self._held[row] = list(table)

    def copy_to(self, fields: Tensor, tables: Tensor, size: int) -> None:
        fields.copy_(self.fields, non_blocking=True)
        tables[:size].copy_(self.tables[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _row(chunk: Chunk, block_size: int) -> tuple[int, int, int, int, int]:
    sequence, at = chunk.sequence, chunk.start
    place = sequence.block_table[at // block_size] * block_size + at % block_size
    return (sequence.tokens[at], at, sequence.slot, place, at + 1)


class DecodeGraphs:
    def __init__(self, base: Base, pool: KVPool, *, max_batch: int, max_model_len: int, capture: Capture) -> None:
        """The kernel and the slots of the base's `LoraBatch` must be set before."""
        self._base, self._pool, self._capture = base, pool, capture
        self.sizes = batch_sizes(max_batch)
        width, device = -(-max_model_len // pool.block_size), base.device
        self._fields = torch.zeros(len(_PADDING), max_batch, dtype=torch.int32, device=device)
        self._tables = torch.full((max_batch, width), NULL_BLOCK, dtype=torch.int32, device=device)
        self._every_row = torch.arange(max_batch, device=device)
        self._stagings = [_Staging(max_batch, width, device) for _ in range(2)]
        self._replays: dict[tuple[int, bool], Step] = {}

    def capture_all(self) -> None:
        """Captures every size, the largest first, so that the smaller ones reuse its memory."""
        for size in reversed(self.sizes):
            self._copy_in((), size)
            for with_lora in (True, False):
                self._replays[size, with_lora] = self._capture(partial(self.step, size, with_lora))

    def can_run(self, plan: StepPlan) -> bool:
        """Whether the step only decodes, with at most as many rows as the largest captured size, and without an adapter
        that changes an embedding or experts."""
        slots = self._base.lora.slots
        if plan.prefills or not 0 < len(plan.decodes) <= self.sizes[-1]:
            return False
        return slots is None or not any(slots.runs_by_torch(chunk.sequence.slot) for chunk in plan.decodes)

    def run(self, plan: StepPlan) -> Tensor:
        """Returns [decoding rows, vocabulary], which the next `run` overwrites."""
        return self.replay(plan.decodes, next(size for size in self.sizes if size >= len(plan.decodes)))

    def replay(self, decodes: tuple[Chunk, ...], size: int) -> Tensor:
        """Runs the graph of this size, which must be at least the number of rows."""
        self._copy_in(decodes, size)
        with_lora = any(chunk.sequence.slot != BASE_SLOT for chunk in decodes)
        return self._replays[size, with_lora]()[: len(decodes)]

    def clear(self) -> None:
        """Frees the graphs and their memory. No step can run afterwards."""
        self._replays.clear()
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)
            torch.cuda.empty_cache()

    def step(self, size: int, with_lora: bool) -> Tensor:
        """The captured code: returns [size, vocabulary] from the contents of the tensors on the device."""
        fields = self._fields[:, :size]
        if with_lora:
            self._base.lora.use(fields[_SLOT])
        else:
            self._base.lora.set(())
        attention = DecodeAttention(TritonDecode(self._pool, fields[_PLACE], fields[_CONTEXT], self._tables[:size]))
        token_ids, positions = fields[: _POSITION + 1].long().unbind(0)
        return self._base.logits(token_ids, positions, self._every_row[:size], attention)

    def _copy_in(self, chunks: tuple[Chunk, ...], size: int) -> None:
        self._stagings.reverse()
        staging = self._stagings[0]
        staging.fill(chunks, size, self._pool.block_size)
        staging.copy_to(self._fields, self._tables, size)
