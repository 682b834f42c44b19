"""A decode step as one captured launch: what the host adds to a step on a GPU is two small copies.

`core` makes one where the device is CUDA, `runner` hands it the steps that only decode. The batch is padded to one
of a few sizes; each size, with and without LoRA, is captured once at start over tensors that stay where they are, and
replayed. A padding row has slot -1, context 0 and the null block: it reads and writes nothing. Whatever is captured
must not look at a value on the host nor have a shape that follows from one (the tests hold it to that on a CPU).
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
    """Turns a step into its replay, which computes the same tensor from what its inputs hold then."""

    def __call__(self, step: Step) -> Step: ...


class CudaCapture:
    """CUDA graphs of one memory pool. The tensor a replay returns is overwritten by the next replay."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch declares no types here
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles the kernels and makes the libraries' workspaces: neither is allowed in a capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The sizes a batch is padded to: powers of two, and the largest there can be."""
    powers = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return (*powers, max_batch)


class DecodeAttention:
    """`attention.Attention` for one token per row."""

    def __init__(self, decode: TritonDecode) -> None:
        self._decode = decode

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        window, softcap = wants.window, wants.softcap
        return self._decode.attend(layer, q[0], k[0], v[0], scale=scale, window=window, softcap=softcap)[None]


class _Staging:
    """A step's rows on the host, in memory the device reads by itself; it must not change while a copy is under way."""

    def __init__(self, max_batch: int, width: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.fields = torch.zeros(len(_PADDING), max_batch, dtype=torch.int32, pin_memory=on_cuda)
        self.tables = torch.full((max_batch, width), NULL_BLOCK, dtype=torch.int32, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]  # as above
        self._fields, self._tables = self.fields.numpy(), self.tables.numpy()
        self._held: list[list[int]] = [[] for _ in range(max_batch)]

    def fill(self, chunks: tuple[Chunk, ...], size: int, block_size: int) -> None:
        """Waits for the last copy from here, which was two steps ago."""
        if self._copied is not None:
            self._copied.synchronize()
        rows = [_row(chunk, block_size) for chunk in chunks] + [_PADDING] * (size - len(chunks))
        self._fields[:, :size] = np.array(rows, np.int32).T
        for row in range(size):
            table = chunks[row].sequence.block_table if row < len(chunks) else []
            if table != self._held[row]:  # most steps change no table
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
        """Needs the batch's row kernel and slabs in place (`lora.LoraBatch`)."""
        self._base, self._pool, self._capture = base, pool, capture
        self.sizes = batch_sizes(max_batch)
        width, device = -(-max_model_len // pool.block_size), base.device
        self._fields = torch.zeros(len(_PADDING), max_batch, dtype=torch.int32, device=device)
        self._tables = torch.full((max_batch, width), NULL_BLOCK, dtype=torch.int32, device=device)
        self._every_row = torch.arange(max_batch, device=device)
        self._stagings = [_Staging(max_batch, width, device) for _ in range(2)]
        self._replays: dict[tuple[int, bool], Step] = {}

    def capture_all(self) -> None:
        """Every size, the largest first: its memory serves the smaller ones."""
        for size in reversed(self.sizes):
            self._copy_in((), size)
            for with_lora in (True, False):
                self._replays[size, with_lora] = self._capture(partial(self.step, size, with_lora))

    def can_run(self, plan: StepPlan) -> bool:
        """Whether the step is nothing but decoding, of a size that was captured."""
        return not plan.prefills and 0 < len(plan.decodes) <= self.sizes[-1]

    def run(self, plan: StepPlan) -> Tensor:
        """-> [decoding rows, vocabulary], to be used before the next `run`."""
        count = len(plan.decodes)
        size = next(size for size in self.sizes if size >= count)
        self._copy_in(plan.decodes, size)
        with_lora = any(chunk.sequence.slot != BASE_SLOT for chunk in plan.decodes)
        return self._replays[size, with_lora]()[:count]

    def step(self, size: int, with_lora: bool) -> Tensor:
        """What is captured: [size, vocabulary] from what the tensors on the device hold."""
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
