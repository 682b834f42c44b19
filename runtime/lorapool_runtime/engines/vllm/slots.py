"""Which adapter vLLM has in which slot. Used by the engine's thread alone.

vLLM reports success also where it drops matrices of an adapter. So every value in the slot is compared with what was
read, and only then the slot is given to requests. Names and numbers are never used again: vLLM's prefix cache and its
kernels know an adapter by them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.engines.interface import BASE_SLOT, HostAdapter, LoadOutcome, SlotInUseError
from lorapool_runtime.engines.vllm.names import Vllm

log = logging.getLogger(__name__)

NOT_FINITE = "the model's output is not finite"

Shape = tuple[int, int, int]
"""Of the two matrices of a layer: (rank, in_features, out_features)."""


class RefusedSlotError(Exception):
    """A request must not run on this slot; the message says why."""


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """`interface.HostAdapter`: a folder whose every value was checked. vLLM reads it again when it is loaded."""

    folder: str
    rank: int
    target_modules: tuple[str, ...]
    shapes: Mapping[str, Shape]
    """By vLLM's name of the layer."""
    host_bytes: int = 0


@dataclass(slots=True)
class _Resident:
    lora: Any
    number: int
    folder: str
    salt: str | None = None
    """Identity of its weights, as its first request says."""


class Slots:
    def __init__(self, vllm: Vllm, llm: Any, *, count: int, slot_bytes: int) -> None:
        self._vllm = vllm
        self._llm = llm
        self._count = count
        self._slot_bytes = slot_bytes
        self._residents: dict[int, _Resident] = {}
        self._running: Counter[int] = Counter()  # requests by slot
        self._changing = asyncio.Lock()
        self._cleaning = asyncio.Lock()
        self._numbers = 0
        self.excluded: set[str] = set()
        """Folders of adapters with which an output was not finite. Any thread may look something up."""

    # --- requests ---

    def enter(self, slot: int, salt: str) -> Any:
        """Counts one more request on the slot; returns its `LoRARequest`, None for the base. Raises RefusedSlotError.

        salt: the identity of the weights that the request is for.
        """
        lora = None
        if slot != BASE_SLOT:
            resident = self._residents.get(slot)
            if resident is None:
                raise RefusedSlotError(f"slot {slot} has no adapter")
            if resident.folder in self.excluded:
                raise RefusedSlotError(NOT_FINITE)
            if resident.salt not in (None, salt):
                raise RefusedSlotError(f"slot {slot} has other weights than the request is for")
            resident.salt, lora = salt, resident.lora
        self._running[slot] += 1
        return lora

    def leave(self, slot: int) -> None:
        self._running[slot] -= 1

    async def clean(self, slot: int) -> None:
        """Excludes the adapter in the slot, whose output is not finite, and cleans the KV cache of what that left.

        While it is cleaned, other requests may meet the same values: their adapters are not excluded.
        """
        if not self._cleaning.locked() and (resident := self._residents.get(slot)) is not None:
            self.excluded.add(resident.folder)
            log.error("an adapter's output is not finite; it is not served again", extra={"folder": resident.folder})
        async with self._cleaning:
            removed = await self._llm.collective_rpc("lorapool_remove_non_finite")
        log.warning("removed %d values that were not finite from the KV cache", sum(removed))

    # --- adapters ---

    async def load(self, slot: int, adapter: HostAdapter) -> LoadOutcome:
        if not isinstance(adapter, CheckedAdapter):
            raise TypeError("load takes only what read_adapter of this engine returned")
        async with self._changing:
            self._require_unused(slot)
            if adapter.folder in self.excluded:
                raise excluded()
            began_s = time.monotonic()
            await self._remove(slot)
            self._numbers += 1
            number = self._numbers
            lora = self._vllm.lora(f"{Path(adapter.folder).name}#{number}", number, adapter.folder)
            try:
                await self._llm.add_lora(lora)
                check_placed(adapter.shapes, await self._llm.collective_rpc("lorapool_placed", args=(number,)))
            except BaseException as error:
                if self._llm.errored:
                    raise
                await asyncio.shield(self._llm.remove_lora(number))  # vLLM keeps what it could not place
                if isinstance(error, ArtifactError) or not isinstance(error, Exception):
                    raise
                raise _not_loaded(str(error)) from error
            self._residents[slot] = _Resident(lora, number, adapter.folder)
            return LoadOutcome(slot, self._slot_bytes, time.monotonic() - began_s)

    async def unload(self, slot: int) -> int:
        async with self._changing:
            self._require_unused(slot)
            await self._remove(slot)
        return 0

    async def _remove(self, slot: int) -> None:
        resident = self._residents.pop(slot, None)
        if resident is not None:
            await self._llm.remove_lora(resident.number)

    def _require_unused(self, slot: int) -> None:
        if not 0 <= slot < self._count:
            raise ValueError(f"there is no slot {slot}")
        if self._running[slot]:
            raise SlotInUseError(f"slot {slot} still has requests")


def check_placed(wanted: Mapping[str, Shape], workers: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """Raises ArtifactError unless the workers together have exactly the wanted layers, each in its shape."""
    placed = {layer: tuple(shape) for worker in workers for layer, shape in worker.items()}
    for layer, shape in wanted.items():
        if placed.get(layer) != shape:
            raise _not_loaded(f"vLLM took {placed.get(layer, 'nothing')} for {layer}, not {shape}")
    if surplus := sorted(placed.keys() - wanted.keys()):
        raise _not_loaded(f"vLLM took matrices for {surplus[0]}, of which the adapter has none")


def excluded() -> ArtifactError:
    """The refusal of an adapter with which an output was not finite."""
    return ArtifactError(
        FailureReason.NON_FINITE_WEIGHTS,
        "with this adapter the model's output was not finite: the training diverged, train it again with a lower "
        "learning rate",
    )


def _not_loaded(why: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.INCOMPATIBLE,
        f"vLLM does not load this adapter as it is ({why[:300]}); save it with a current peft, or serve its base with "
        "the torch engine",
    )
