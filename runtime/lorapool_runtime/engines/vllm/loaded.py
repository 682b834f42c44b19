"""Starts vLLM on a base, and says what is known once it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_runtime.engines.interface import ModelFacts
from lorapool_runtime.engines.vllm.base import Adaptable, BaseFolder, adaptable, read_base
from lorapool_runtime.engines.vllm.config import EngineConfig
from lorapool_runtime.engines.vllm.names import Vllm
from lorapool_runtime.engines.vllm.slots import CheckedAdapter, Slots
from lorapool_runtime.weights.pack import Throttle
from lorapool_runtime.weights.reader import AdapterReader

SHUTDOWN_S = 5.0
"""vLLM's processes are killed if they have not ended by then."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Never changes, except for the slots."""

    llm: Any
    """The `AsyncLLM`."""
    facts: ModelFacts
    slots: Slots
    reader: AdapterReader
    adaptable: Adaptable
    device_bytes: int
    cache_blocks: int
    tokenizer_end_ids: frozenset[int]

    def read(self, folder: str, max_rank: int, throttle: Throttle) -> CheckedAdapter:
        """Checks every value of an adapter. Blocks. Raises ArtifactError."""
        plan = self.reader.check(Path(folder), max_rank=max_rank, throttle=throttle)
        names = self.adaptable.vllm_names
        linears = zip(self.adaptable.modules, plan.layout.linears, strict=True)
        shapes = {
            names[module.name]: (one.rank, one.in_features, one.out_features) for module, one in linears if one.rank
        }
        return CheckedAdapter(folder, plan.rank, plan.target_modules, shapes)


async def start_vllm(
    vllm: Vllm, config: EngineConfig, on_step: Callable[[Any, Any], None], gather: Callable[[], None]
) -> Loaded:
    """Blocks the event loop until vLLM runs. `gather` blocks until the other nodes can start too.

    Raises EngineStartError, ArtifactError, or what reading the base raises.
    """
    base = await asyncio.to_thread(read_base, Path(config.model_dir))
    context = base.context(config.max_model_len)
    prepared = prepare(vllm, config, base)
    gather()
    llm = vllm.engine(prepared, on_step)
    try:
        workers = await llm.collective_rpc("lorapool_describe")
        found = adaptable(base.modules, [layer for worker in workers for layer in worker["layers"]])
        model = llm.vllm_config.model_config
        facts = ModelFacts(
            max_model_len=context,
            vocab_size=model.get_vocab_size(),
            dtype=str(model.dtype).removeprefix("torch."),
            eos_token_ids=base.eos_token_ids,
            targets=found.targets,
            modules=found.modules,
            weight_bytes=_sum(workers, "weight_bytes"),
            slots_reserved=True,
            device=vllm.device_name(),
            slot_bytes=_sum(workers, "adapter_bytes"),
            host_tier=False,
            exact_seeds=False,
        )
        tokenizer_end = llm.get_tokenizer().eos_token_id if base.has_tokenizer else None
        return Loaded(
            llm,
            facts,
            Slots(
                vllm,
                llm,
                count=config.slots,
                slot_bytes=_sum(workers, "slot_bytes"),
                nodes=1 if config.group is None else config.group.size,
            ),
            AdapterReader(found.groups, facts.dtype, BaseFacts.of(found.modules)),
            found,
            device_bytes=_sum(workers, "weight_bytes", "cache_bytes", "adapter_bytes"),
            cache_blocks=llm.vllm_config.cache_config.num_gpu_blocks,
            tokenizer_end_ids=frozenset() if tokenizer_end is None else frozenset({tokenizer_end}),
        )
    except BaseException:
        llm.shutdown(timeout=SHUTDOWN_S)
        raise


def prepare(vllm: Vllm, config: EngineConfig, base: BaseFolder) -> Any:
    """vLLM's configuration of a node for the base. Raises EngineStartError."""
    return vllm.prepared(
        config,
        max_model_len=base.context(config.max_model_len) + 1,  # a prompt that fills the context can then be scored
        target_modules=base.linear_names,
        with_tokenizer=base.has_tokenizer,
    )


def _sum(workers: list[dict[str, Any]], *names: str) -> int:
    return sum(worker[name] for worker in workers for name in names)
