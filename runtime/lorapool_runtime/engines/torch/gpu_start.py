"""The start of the engine on a GPU: compiles its kernels, captures its graphs, and checks both before they serve.

Kernels are compared with torch's operators, and each graph with the step that it captured. A graph that cannot be
captured, or computes something else, costs speed and nothing else: decode steps then run the model's own code, which is
a warning and a metric. A kernel that computes something else is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lorapool_runtime.engines.errors import UnsupportedBaseError
from lorapool_runtime.engines.interface import BASE_SLOT, DecodeProgramState
from lorapool_runtime.engines.torch.cuda_graphs import Capture, DecodeGraphs
from lorapool_runtime.engines.torch.lora.dispatch import SlotRows, adapter_segments
from lorapool_runtime.engines.torch.lora.kernel_gpu import TritonKernel
from lorapool_runtime.engines.torch.lora.layer import TorchLoraOp
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.engines.torch.model.attention import TorchRows, TritonRows
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.runner import Runner
from lorapool_runtime.engines.torch.scheduling.scheduler import StepPlan
from lorapool_runtime.engines.torch.transfers import to_device
from lorapool_runtime.engines.torch.trial_steps import (
    TOLERANCE,
    blocks_of,
    decode_plan,
    random_adapters,
    relative_error,
)

log = logging.getLogger(__name__)

_CONTEXTS = (1, 2, 15, 16, 17, 40, 129, 700)
"""Contexts of the rows that are compared, in turn: around a block's end, and across the parts of a program."""
_TILED_ROWS = 40
"""Rows of one adapter in a prompt: more than one tile has."""
_KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Of one operator, relative to the largest result: a few roundings in the type."""


class GraphError(Exception):
    """A captured graph computes something else than the step that it captured."""


def load_kernels(runner: Runner, slots: AdapterSlots) -> None:
    """Compiles the kernels, and adds LoRA by them from now on. Raises UnsupportedBaseError where they differ from "
    "torch."""
    runner.base.lora.kernel = kernel = TritonKernel(slots)
    kernel.warm_up(slots)
    _check_attention(runner)
    with random_adapters(runner.base, slots) as used:
        one_row_each = [SlotRows(slot, row, row + 1) for row, slot in enumerate((*used, BASE_SLOT, *used))]
        prompts = [SlotRows(used[0], 0, _TILED_ROWS), SlotRows(BASE_SLOT, _TILED_ROWS, _TILED_ROWS + 3)]
        prompts.append(SlotRows(used[-1], _TILED_ROWS + 3, _TILED_ROWS + 13))
        for batch in (one_row_each, prompts):
            _check_lora(kernel, slots, batch, runner.base.dtype)


def _check_lora(kernel: TritonKernel, slots: AdapterSlots, batch: Sequence[SlotRows], dtype: torch.dtype) -> None:
    add = kernel.prepare(batch)
    for group in slots.by_kernel:
        x = torch.randn(batch[-1].end, group.in_features, device=slots.memory.device).to(dtype)
        y = torch.randn(batch[-1].end, sum(group.out_features), device=slots.memory.device).to(dtype)
        expected = y.clone()
        add(y, x, group)
        for segment in adapter_segments(batch):
            TorchLoraOp(segment, slots).add(group.number, x, expected)
        _require(relative_error(y, expected), dtype, "LoRA")


def _check_attention(runner: Runner) -> None:
    base, pool = runner.base, runner.pool
    longest = (pool.data.shape[2] - 1) * pool.block_size
    plan = decode_plan(pool, [min(context, longest) for context in _CONTEXTS], base.vocab_size)
    tables = [chunk.sequence.block_table for chunk in plan.decodes]
    width = max(map(len, tables))
    tables = [table + [0] * (width - len(table)) for table in tables]
    last = [chunk.start for chunk in plan.decodes]
    places = [
        table[at // pool.block_size] * pool.block_size + at % pool.block_size
        for table, at in zip(tables, last, strict=True)
    ]
    at = to_device(places, torch.int64, base.device)
    for wants, layer in {wants: layer for layer, wants in enumerate(base.layers)}.items():
        heads = (base.query_heads, wants.kv_heads, wants.kv_heads)
        q, k, v = (torch.randn(n, len(last), wants.head_dim, device=base.device).to(base.dtype) for n in heads)
        with _noise(pool, plan):
            got = TritonRows(pool, at, tables, last).attend(layer, q, k, v, wants.head_dim**-0.5, wants)
            expected = TorchRows(pool, tables, last).attend(layer, q, k, v, wants.head_dim**-0.5, wants)
        _require(relative_error(got, expected), base.dtype, "attention")


def _require(error: float, dtype: torch.dtype, kernel: str) -> None:
    if not error <= _KERNEL_TOLERANCE[dtype]:
        raise UnsupportedBaseError(
            f"the {kernel} kernels differ from torch's operators on this GPU (relative error {error:.2g}); run on "
            "the CPU with --device cpu, and report the GPU and the base"
        )


def load_graphs(
    runner: Runner, slots: AdapterSlots, *, max_batch: int, max_model_len: int, capture: Capture
) -> tuple[DecodeGraphs | None, DecodeProgramState]:
    """None, and the reason in the state, where the model's own code must serve. The kernels must be loaded.

    The pool and the slots must be unused, and are left so.
    """
    graphs = DecodeGraphs(runner.base, runner.pool, max_batch=max_batch, max_model_len=max_model_len, capture=capture)
    try:
        graphs.capture_all()
        compared = _check_graphs(graphs, runner, slots, max_model_len=max_model_len)
    except GraphError as error:
        return None, _fallback(graphs, "unverified", str(error))
    except (
        RuntimeError,
        ValueError,
        TypeError,
        NotImplementedError,
    ) as error:  # CUDA's and out of memory are RuntimeErrors
        return None, _fallback(graphs, "not_captured", f"{type(error).__name__}: {error}")
    log.info("decode graphs", extra={"sizes": list(graphs.sizes), "compared_steps": compared})
    return graphs, DecodeProgramState(active=True)


def _fallback(graphs: DecodeGraphs, reason: str, detail: str) -> DecodeProgramState:
    graphs.clear()
    log.warning("no decode graphs (%s), the model's own code serves, which is slower: %s", reason, detail)
    return DecodeProgramState(active=False, reason=reason)


def _check_graphs(graphs: DecodeGraphs, runner: Runner, slots: AdapterSlots, *, max_model_len: int) -> int:
    """Compares a replay of every graph with the model's own code: full batches of base and adapters in turn, and
    batches of the base with a padding row. Returns how many steps were compared. Raises GraphError."""
    compared = 0
    with random_adapters(runner.base, slots) as used:
        in_turn = (*used, BASE_SLOT)  # a batch of one has an adapter
        for size in graphs.sizes:
            contexts = [min(_CONTEXTS[i % len(_CONTEXTS)], max_model_len) for i in range(size)]
            mixed = [in_turn[i % len(in_turn)] for i in range(size)]
            for rows, of_rows in ((size, mixed), (max(1, size - 1), [BASE_SLOT] * size)):
                plan = decode_plan(runner.pool, contexts[:rows], runner.base.vocab_size, of_rows)
                with _noise(runner.pool, plan):
                    error = relative_error(graphs.replay(plan.decodes, size).clone(), runner.run(plan))
                if not error <= TOLERANCE[runner.base.dtype]:
                    kind = "with adapters" if of_rows is mixed else "of the base"
                    raise GraphError(
                        f"the graph of {size} rows {kind} differs from the model (relative error {error:.2g})"
                    )
                compared += 1
    return compared


@contextmanager
def _noise(pool: KVPool, plan: StepPlan) -> Iterator[None]:
    """The plan's blocks hold random numbers meanwhile, and zeros afterwards."""
    blocks = blocks_of(plan)
    at = torch.tensor(blocks, device=pool.data.device)
    for region in pool.data.flatten(0, 1):  # one layer's keys or values at a time: [blocks, width]
        noise = torch.randn(len(blocks), region.shape[1], device=region.device)
        region.index_copy_(0, at, noise.to(region.dtype))
    try:
        yield
    finally:
        pool.wipe(blocks)
