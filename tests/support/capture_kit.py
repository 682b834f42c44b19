"""A dispatch mode that allows only what a CUDA graph can capture, for tests without a GPU.

The step's tensors are on the meta device, which has shapes and no values, so reading a value fails there anyway;
`CaptureGuard` fails with an explanation, and refuses what the meta device would allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
_DATA_DEPENDENT = (
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "argwhere",
    "unique",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
)
_CONSTANTS = ("lift_fresh", "lift_fresh_copy")
_COPIES = ("_to_copy", "to", "copy_")


class NotCapturableError(AssertionError):
    """The step does something that a capture forbids or that a replay would not repeat."""


class CaptureGuard(TorchDispatchMode):
    """Checks every operator inside the `with` block; `ran` lists their names in order."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        inputs = list(_tensors((args, kwargs)))
        if name in _SYNCS:
            raise NotCapturableError(f"{func}: a value goes to the host, which waits for it")
        if name in _DATA_DEPENDENT or (name == "repeat_interleave" and "Tensor" in func.name()):
            raise NotCapturableError(f"{func}: the shape of its result depends on data")
        if name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in inputs[1:]):
            raise NotCapturableError(f"{func}: a mask selects as many as it finds")
        if name in _CONSTANTS:
            raise NotCapturableError(f"{func}: a constant is copied from the host's pageable memory")
        named = (kwargs or {}).get("device")
        strangers = {t.device for t in inputs} | ({torch.device(named)} if named is not None else set())
        strangers = strangers - {self.device}
        if strangers and name in _COPIES:
            raise NotCapturableError(f"{func}: a copy between {strangers} and {self.device}, in pageable memory")
        if strangers:
            raise NotCapturableError(f"{func}: a tensor on {strangers} in a step on {self.device}")
        result = func(*args, **(kwargs or {}))
        self.ran.append(func.name())
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
