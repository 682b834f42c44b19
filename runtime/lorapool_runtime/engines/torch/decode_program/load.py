"""Makes the decode program at start, or reports why the model's own code serves.

A fallback costs speed and nothing else, so it is a warning and a metric, never an error.
"""

from __future__ import annotations

import logging

import torch

from lorapool_runtime.engines.interface import DecodeProgramState
from lorapool_runtime.engines.torch.decode_program.ops import DecodeGraph
from lorapool_runtime.engines.torch.decode_program.step_program import StepProgram
from lorapool_runtime.engines.torch.decode_program.trace import UntraceableModelError, trace
from lorapool_runtime.engines.torch.decode_program.verify import (
    VerificationError,
    record_decode,
    verify,
)
from lorapool_runtime.engines.torch.kernels.base_step import BaseKernel, PagedDecode, base_kernel
from lorapool_runtime.engines.torch.lora.kernel_cpu import NativeRowKernel
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base
from lorapool_runtime.engines.torch.trial_steps import decode_plan

log = logging.getLogger(__name__)

_TRACED_POSITIONS = (1, 5, 11)


def load_decode_program(
    base: Base, pool: KVPool, *, max_batch: int, max_model_len: int
) -> tuple[StepProgram | None, DecodeProgramState]:
    """None, and the reason in the state, where the model's own code must serve.

    The pool and the slots must be unused, and are left so."""
    kernel, lora = base_kernel(), base.lora.kernel
    if kernel is None or not isinstance(lora, NativeRowKernel) or not PagedDecode.serves(pool.data, pool.head_dim):
        return None, _fallback("no_kernels", "the native kernels do not serve this base")
    try:
        graph = _traced(base, pool)
        program = _verified(graph, base, pool, kernel, lora, max_batch=max_batch, max_model_len=max_model_len)
    except UntraceableModelError as error:
        return None, _fallback("untraceable", str(error))
    except VerificationError as error:
        return None, _fallback("unverified", str(error))
    return program, DecodeProgramState(active=True)


def _fallback(reason: str, detail: str) -> DecodeProgramState:
    log.warning("no decode program (%s), the model's own code serves: %s", reason, detail)
    return DecodeProgramState(active=False, reason=reason)


def _traced(base: Base, pool: KVPool) -> DecodeGraph:
    plan = decode_plan(pool, [position + 1 for position in _TRACED_POSITIONS], base.vocab_size)
    try:
        return trace(record_decode(base, pool, plan, torch.tensor([chunk.start for chunk in plan.decodes])))
    finally:
        pool.wipe(tuple(chunk.sequence.block_table[0] for chunk in plan.decodes))
        base.lora.set(())


def _verified(
    graph: DecodeGraph,
    base: Base,
    pool: KVPool,
    kernel: BaseKernel,
    lora: NativeRowKernel,
    *,
    max_batch: int,
    max_model_len: int,
) -> StepProgram:
    program = StepProgram(graph, base, pool, kernel, lora, max_batch=max_batch)
    count = verify(program, graph, base, pool, max_batch=max_batch, last=max_model_len - 1)
    log.info("decode program", extra={"operators": len(graph.ops), "verified_conditions": count})
    return program
