"""The native row kernel on CPU: LoRA for rows in any order and of any mix of ranks, in one call per group of linears.

Where the library was not built or cannot be used in this process, torch multiplies slot by slot (`layer.TorchLoraOp`).
While torch traces, the kernel is the operator `lorapool::add_lora_rows`. Otherwise the library is called directly,
because a dispatch through torch costs as much as the products of a small group.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorapool_runtime.engines.torch.lora.slots import GroupTables
from lorapool_runtime.native_library import FOLDER, NativeUnavailableError, open_library

log = logging.getLogger(__name__)

NAME, VERSION = "lora_rows", 4  # of the library and its interface


def load_row_kernel(dtype: torch.dtype, device: torch.device, folder: Path = FOLDER) -> NativeRowKernel | None:
    """Returns None, and logs the reason, where torch has to compute LoRA instead."""
    try:
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            raise NativeUnavailableError(f"it does not support {str(dtype).removeprefix('torch.')} on {device}")
        kernel = NativeRowKernel(open_library(NAME, VERSION, folder))
    except NativeUnavailableError as error:
        log.info("no native LoRA kernel, torch multiplies instead: %s", error)
        return None
    log.info("native LoRA kernel", extra={"isa": kernel.isa})
    return kernel


class _Group(ctypes.Structure):
    """`LoraGroup` of lora_rows.h."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("a_at", ctypes.c_void_p),
        ("b_at", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("members", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
    )


class NativeRowKernel:
    """`layer.RowKernel` for adapters in float32 and bfloat16 on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._add = library.lora_rows_add
        self._add.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64]
        self._add.restype = ctypes.c_int
        library.lora_rows_calls.restype = ctypes.c_void_p
        self._calls = library.lora_rows_calls()
        library.lora_rows_isa.restype = ctypes.c_char_p
        self.isa: str = library.lora_rows_isa().decode()
        self._groups: dict[int, _Described] = {}

    def add(self, y: Tensor, x: Tensor, row_slots: Tensor, group: GroupTables) -> None:
        """See `layer.RowKernel.add`. Raises ValueError for tensors of another shape, type or memory format."""
        if torch.compiler.is_compiling():
            add_lora_rows(y, x, row_slots, group.memory, group.ranks, group.a_at, group.b_at, list(group.out_features))
            return
        described = self._prepared(group)
        rows = row_slots.shape[0]
        if x.shape != (rows, group.in_features) or y.shape != (rows, described.out_features):
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {rows} rows of group {group.number}"
            )
        if not (x.is_contiguous() and y.is_contiguous() and row_slots.is_contiguous()):
            raise ValueError("the row kernel needs contiguous tensors")
        if x.dtype != group.memory.dtype or y.dtype != x.dtype or row_slots.dtype != torch.int32:
            raise ValueError(f"x is {x.dtype}, y {y.dtype}, row_slots {row_slots.dtype}; adapters {group.memory.dtype}")
        failed = self._add(described.address, y.data_ptr(), x.data_ptr(), row_slots.data_ptr(), rows)
        if failed:
            raise MemoryError if failed == 2 else ValueError("a row names a slot that does not exist")

    @property
    def calls(self) -> int:
        """The address of the library's `LoraCalls`, for native code that has its own threads."""
        address: int = self._calls
        return address

    def address_of(self, group: GroupTables) -> int:
        """The address of the `LoraGroup` that describes the group; valid for the life of this kernel."""
        return self._prepared(group).address

    def _prepared(self, group: GroupTables) -> _Described:
        known = self._groups.get(id(group))
        if known is None:
            known = self._groups[id(group)] = _described(group)
        return known


@dataclass(frozen=True, slots=True)
class _Described:
    """A group's `LoraGroup`, and the objects that must live as long as its address is used."""

    address: int
    out_features: int
    keeps_alive: tuple[object, ...]


def _described(group: GroupTables) -> _Described:
    if group.memory.device.type != "cpu" or group.memory.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"no native kernel for {group.memory.dtype} on {group.memory.device}")
    columns = torch.tensor((0, *group.out_features)).cumsum(0)  # int64 [members + 1]
    for table in (group.ranks, group.a_at, group.b_at):
        assert table.is_contiguous()
    structure = _Group(
        memory=group.memory.data_ptr(),
        ranks=group.ranks.data_ptr(),
        a_at=group.a_at.data_ptr(),
        b_at=group.b_at.data_ptr(),
        columns=columns.data_ptr(),
        slots=group.ranks.shape[1],
        in_features=group.in_features,
        members=len(group.out_features),
        bfloat16=group.memory.dtype == torch.bfloat16,
    )
    return _Described(ctypes.addressof(structure), int(columns[-1]), (structure, columns, group))


@torch.library.custom_op("lorapool::add_lora_rows", mutates_args=("y",))
def add_lora_rows(
    y: Tensor,
    x: Tensor,
    row_slots: Tensor,
    memory: Tensor,
    ranks: Tensor,
    a_at: Tensor,
    b_at: Tensor,
    out_features: list[int],
) -> None:
    """`NativeRowKernel.add` for a traced model, with the fields of `GroupTables` as separate arguments."""
    group = GroupTables(0, memory, ranks, a_at, b_at, x.shape[1], tuple(out_features), 0)
    NativeRowKernel(open_library(NAME, VERSION)).add(y, x, row_slots, group)


@add_lora_rows.register_fake
def _(
    y: Tensor,
    x: Tensor,
    row_slots: Tensor,
    memory: Tensor,
    ranks: Tensor,
    a_at: Tensor,
    b_at: Tensor,
    out_features: list[int],
) -> None:
    """Changes y in place and returns no tensor."""
