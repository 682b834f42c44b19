"""Runs in vLLM's own worker processes: what `AsyncLLM` does not tell about adapters and memory.

vLLM mixes `WorkerExtension` into its worker class; `AsyncLLM.collective_rpc` calls the methods by name, between two
steps. They use private attributes of the worker, all of which `lorapool_describe` touches when the engine starts. The
answers are plain values, which vLLM can send between processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shapes = dict[str, tuple[int, int, int]]
"""By the name of a layer: (rank, in_features, out_features)."""


class WorkerExtension:
    model_runner: Any

    def lorapool_describe(self) -> dict[str, Any]:
        """The layers that take adapters, by vLLM's names, and the bytes that are reserved."""
        manager = self._manager()
        if len(manager.lora_index_to_id) < 2 or len(manager._registered_adapters):
            raise RuntimeError("a new engine must have free slots only")
        return {
            "layers": [part for name in manager.modules for part in self._parts(name)],
            "slot_bytes": sum(stack[0].nbytes for module in manager.modules.values() for stack in _stacks(module)),
            "adapter_bytes": sum(stack.nbytes for module in manager.modules.values() for stack in _stacks(module)),
            "weight_bytes": sum(parameter.nbytes for parameter in self.model_runner.model.parameters()),
            "cache_bytes": sum(cache.nbytes for cache in self._caches()),
        }

    def lorapool_placed(self, lora_id: int) -> Shapes:
        """The layers whose matrices of this adapter are in its slot, element by element, and nothing else is.

        Raises RuntimeError for one that is not in a slot, and for a layer whose slot has other values.
        """
        manager = self._manager()
        if lora_id not in manager.lora_index_to_id:
            raise RuntimeError(f"adapter {lora_id} is in no slot")
        slot, adapter = manager.lora_index_to_id.index(lora_id), manager._registered_adapters[lora_id]
        placed: Shapes = {}
        for name, module in manager.modules.items():
            weights = adapter.loras.get(name)
            if weights is None:
                continue
            parts = self._parts(name)
            every_a, every_b = (one if isinstance(one, list) else [one] for one in (weights.lora_a, weights.lora_b))
            for number, (part, a, b) in enumerate(zip(parts, every_a, every_b, strict=True)):
                if a is None:
                    continue
                if module.tp_size == 1 and not (
                    _holds(module.lora_a_stacked[number][slot], a) and _holds(module.lora_b_stacked[number][slot], b)
                ):
                    raise RuntimeError(f"the slot of {part} has other values than the adapter")
                placed[part] = (a.shape[0], a.shape[1], b.shape[0])
        foreign = adapter.loras.keys() - manager.modules.keys()
        if foreign:
            raise RuntimeError(f"vLLM has no layer {sorted(foreign)[0]} that takes adapters")
        return placed

    def lorapool_resident(self) -> list[int]:
        """The ids of the adapters in slots and in vLLM's own cache."""
        manager = self._manager()
        return sorted({*(one for one in manager.lora_index_to_id if one is not None), *manager._registered_adapters})

    def lorapool_remove_non_finite(self) -> int:
        """Overwrites every value of the KV cache that is not finite, and returns how many there were.

        A request whose values are all finite is unchanged by it. Attention multiplies the unused part of a block by 0,
        which is not 0 for what an earlier request has left there if that is not finite.
        """
        found = 0
        for cache in self._caches():
            if cache.is_floating_point():
                found += int((~cache.isfinite()).sum())
                cache.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return found

    def _manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager

    def _parts(self, name: str) -> list[str]:
        """The layers that vLLM computes as one, in the order of its slices."""
        manager = self._manager()
        return list(manager.packed_modules.get(name) or [name])

    def _caches(self) -> Iterator[Any]:
        for cache in self.model_runner.kv_caches:
            yield from cache if isinstance(cache, list | tuple) else (cache,)


def _stacks(module: Any) -> tuple[Any, ...]:
    return (*module.lora_a_stacked, *module.lora_b_stacked)


def _holds(slot: Any, matrix: Any) -> bool:
    """Whether a slot's region [1, rows, cols] holds the matrix and zeros."""
    rows, cols = matrix.shape
    if rows > slot.shape[1] or cols > slot.shape[2]:
        return False
    part = slot[0, :rows, :cols]
    same = bool((part == matrix.to(device=part.device, dtype=part.dtype)).all())
    return same and int(slot.count_nonzero()) == int(part.count_nonzero())
