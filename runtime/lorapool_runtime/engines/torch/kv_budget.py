"""How many bytes the KV cache gets, unless a setting says so: a share of what is free once the base is loaded.

On a CPU other processes need memory too. A GPU belongs to the engine: all of it but what the largest step needs, which
is measured by running one, and a reserve for captured graphs and fragmentation.
"""

from __future__ import annotations

import logging

import torch

from lorapool_runtime.cgroup import usable_memory_bytes
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.model.attention import LayerAttention, ProbeAttention
from lorapool_runtime.engines.torch.model.load import Base

log = logging.getLogger(__name__)

_CPU_SHARE = 0.4
_GPU_SHARE = 0.9


def kv_bytes(config: EngineConfig, base: Base, max_model_len: int) -> int:
    """The setting, else the share. The base and the adapter slots must be in memory already."""
    if config.kv_bytes is not None:
        return config.kv_bytes
    if base.device.type == "cpu":
        return int(_CPU_SHARE * usable_memory_bytes())
    step = measured_step_bytes(base, config.max_batch_tokens, config.max_batch)
    attention = chunk_attention_bytes(
        base.layers[0], base.query_heads, config.max_batch_tokens, max_model_len, base.dtype.itemsize
    )
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(base.device)[0]
    log.info("memory of the GPU", extra={"free_bytes": free, "step_bytes": step, "attention_bytes": attention})
    return gpu_share(free, step + attention)


def gpu_share(free: int, step: int) -> int:
    """free: bytes free after loading; step: bytes that the largest step needs. May be negative."""
    return int(_GPU_SHARE * (free - step))


def measured_step_bytes(base: Base, tokens: int, rows: int) -> int:
    """Bytes that a step of one new prompt of `tokens` tokens allocates at its peak, with logits of `rows` of them in
    the base's type, in float32 and as probabilities."""
    device = base.device
    numbers = torch.arange(tokens, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        base.logits(
            numbers % base.vocab_size, numbers % base.max_positions, numbers[: min(rows, tokens)], ProbeAttention()
        )
    return torch.cuda.max_memory_allocated(device) - before + 4 * rows * base.vocab_size * 4


def chunk_attention_bytes(layer: LayerAttention, heads: int, tokens: int, context: int, itemsize: int) -> int:
    """Bytes of the masks, keys and values of a chunk of `tokens` tokens at the end of the longest context."""
    group = heads // layer.kv_heads
    mask = tokens * context * (1 + itemsize + group * itemsize)  # as booleans, as numbers, and repeated for the group
    return mask + 2 * context * layer.kv_heads * layer.head_dim * itemsize
