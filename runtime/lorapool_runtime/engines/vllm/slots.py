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

FILES_WAIT_S = 30.0
"""File systems over a network remember for some seconds that a file was absent."""
FILES_ASK_S = 0.25
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
    def __init__(self, vllm: Vllm, llm: Any, *, count: int, slot_bytes: int, nodes: int = 1) -> None:
        self._vllm = vllm
        self._nodes = nodes
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
            if self._nodes > 1:
                await self._wait_for_files(Path(adapter.folder))
            await self._remove(slot)
            self._numbers += 1
            number = self._numbers
            name = f"{Path(adapter.folder).name}#{number}"
            lora = self._vllm.lora(name, number, adapter.folder)
            try:
                args = name, number, adapter.folder
                check_placed(adapter.shapes, await self._llm.collective_rpc("lorapool_load", args=args))
            except BaseException:
                if not self._llm.errored:  # vLLM keeps what it could not place
                    await asyncio.shield(self._unload(number))
                raise
            self._residents[slot] = _Resident(lora, number, adapter.folder)
            return LoadOutcome(slot, self._slot_bytes, time.monotonic() - began_s)

    async def _wait_for_files(self, folder: Path) -> None:
        """Waits until every process of every node sees the adapter's files whole. Raises ArtifactError after a while.

        A shared file system may show a new folder late. vLLM would fail on that node alone, and with it the group.
        """
        wanted = await asyncio.to_thread(_sizes, folder)
        until_s = time.monotonic() + FILES_WAIT_S
        while missing := [
            one for one in await self._llm.collective_rpc("lorapool_lacks", args=(str(folder), wanted)) if one
        ]:
            if time.monotonic() > until_s:
                raise ArtifactError(
                    FailureReason.LOAD_FAILED,
                    f"a node of the group does not see the adapter's files ({missing[0]}): adapterCache of the profile "
                    "must be one volume that all nodes mount",
                )
            await asyncio.sleep(FILES_ASK_S)

    async def unload(self, slot: int) -> int:
        async with self._changing:
            self._require_unused(slot)
            await self._remove(slot)
        return 0

    async def _remove(self, slot: int) -> None:
        resident = self._residents.pop(slot, None)
        if resident is not None:
            await self._unload(resident.number)

    async def _unload(self, number: int) -> None:
        errors = await self._llm.collective_rpc("lorapool_unload", args=(number,))
        if error := next(filter(None, errors), ""):
            raise RuntimeError(f"vLLM does not unload adapter {number}: {error}")

    def _require_unused(self, slot: int) -> None:
        if not 0 <= slot < self._count:
            raise ValueError(f"there is no slot {slot}")
        if self._running[slot]:
            raise SlotInUseError(f"slot {slot} still has requests")


def _sizes(folder: Path) -> dict[str, int]:
    return {one.name: one.stat().st_size for one in folder.iterdir() if one.is_file()}


def check_placed(wanted: Mapping[str, Shape], workers: Sequence[Mapping[str, Any]]) -> None:
    """Raises ArtifactError unless the workers together have exactly the wanted layers, each in its shape.

    workers: what `lorapool_load` returned of each. With pipeline parallelism each has some of the layers.
    """
    if error := next(filter(None, (worker["error"] for worker in workers)), ""):
        raise _not_loaded(error)
    placed = {layer: tuple(shape) for worker in workers for layer, shape in worker["placed"].items()}
    foreign = {layer for worker in workers for layer in worker["foreign"]}
    if unknown := sorted(foreign - placed.keys()):
        raise _not_loaded(f"vLLM has no layer {unknown[0]} that takes adapters")
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
