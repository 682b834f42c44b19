"""Runs in vLLM's own worker processes: what `AsyncLLM` does not tell about adapters and memory.

vLLM mixes `WorkerExtension` into its worker class; `AsyncLLM.collective_rpc` calls the methods by name, between two
steps. A method that may fail returns its error: after an exception vLLM leaves the answers of the other workers
unread, and takes them for those to its next call. The methods use private attributes of the worker, all of which
`lorapool_describe` touches when the engine starts. The answers are plain values, which vLLM can send between processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

Shapes = dict[str, tuple[int, int, int]]
"""By the name of a layer: (rank, in_features, out_features)."""


class WorkerExtension:
    model_runner: Any
    add_lora: Any
    """Of vLLM's worker, as `remove_lora`."""
    remove_lora: Any

    def lorapool_describe(self) -> dict[str, Any]:
        """The layers that take adapters, by vLLM's names, and the bytes that are reserved."""
        manager = self._manager()
        if len(manager.lora_index_to_id) < 2 or len(manager._registered_adapters):
            raise RuntimeError("a new engine must have free slots only")
        self._make_room_for_the_stage_before()
        return {
            "layers": [part for name in manager.modules for part in self._parts(name)],
            "slot_bytes": sum(stack[0].nbytes for module in manager.modules.values() for stack in _stacks(module)),
            "adapter_bytes": sum(stack.nbytes for module in manager.modules.values() for stack in _stacks(module)),
            "weight_bytes": sum(parameter.nbytes for parameter in self.model_runner.model.parameters()),
            "cache_bytes": sum(cache.nbytes for cache in self._caches()),
        }

    def lorapool_load(self, name: str, lora_id: int, folder: str) -> dict[str, Any]:
        """Puts an adapter into a slot. Returns `placed`, its layers here, `foreign`, those of which this worker has no
        layer, and `error`, which is empty where every value is in its place."""
        from vllm.lora.request import LoRARequest

        try:
            self.add_lora(LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=folder))
            placed, foreign = self._placed(lora_id)
        except Exception as error:
            return {"placed": {}, "foreign": [], "error": str(error) or repr(error)}
        return {"placed": placed, "foreign": foreign, "error": ""}

    def lorapool_unload(self, lora_id: int) -> str:
        """Empties the slot of an adapter; one that is in none is no error. Returns the error."""
        try:
            self.remove_lora(lora_id)
        except Exception as error:
            return str(error) or repr(error)
        return ""

    def _placed(self, lora_id: int) -> tuple[Shapes, list[str]]:
        """The layers whose matrices of this adapter are in its slot, element by element, and nothing else is; and the
        layers of the adapter that are none of this worker's.

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
            parts, own_a, own_b = self._parts(name), weights.lora_a, weights.lora_b
            if module.tp_size > 1:  # the part of this GPU
                own_a, own_b = module.slice_lora_a(own_a), module.slice_lora_b(own_b)
            whole = zip(_listed(weights.lora_a), _listed(weights.lora_b), strict=True)
            own = zip(_listed(own_a), _listed(own_b), strict=True)
            for number, (part, (a, b), (here_a, here_b)) in enumerate(zip(parts, whole, own, strict=True)):
                if a is None:
                    continue
                stack_a, stack_b = module.lora_a_stacked[number][slot], module.lora_b_stacked[number][slot]
                if not (_holds(stack_a, here_a) and _holds(stack_b, here_b)):
                    raise RuntimeError(f"the slot of {part} has other values than the adapter")
                placed[part] = (a.shape[0], a.shape[1], b.shape[0])
        return placed, sorted(adapter.loras.keys() - manager.modules.keys())

    def lorapool_lacks(self, folder: str, wanted: dict[str, int]) -> str:
        """The first of these files (bytes by name) that this node does not have whole; empty if it has all."""
        for name, size in wanted.items():
            try:
                found = os.stat(os.path.join(folder, name)).st_size
            except OSError as error:
                return f"{name}: {error.strerror}"
            if found != size:
                return f"{name}: {found} of {size} bytes"
        return ""

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

    def _make_room_for_the_stage_before(self) -> None:
        """Makes the tensors that receive another node's part of a step, as vLLM's first run of the model does.

        Its build for CPUs skips that run where the size of the KV cache is given, and fails at the first request.
        """
        runner = self.model_runner
        if runner.parallel_config.pipeline_parallel_size > 1 and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    def _manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager

    def _parts(self, name: str) -> list[str]:
        """The layers that vLLM computes as one, in the order of its slices."""
        manager = self._manager()
        return list(manager.packed_modules.get(name) or [name])

    def _caches(self) -> Iterator[Any]:
        for cache in self.model_runner.kv_caches:
            yield from cache if isinstance(cache, list | tuple) else (cache,)


def _listed(matrices: Any) -> list[Any]:
    return matrices if isinstance(matrices, list) else [matrices]


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
