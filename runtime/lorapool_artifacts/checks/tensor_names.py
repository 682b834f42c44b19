"""Finds the LoRA matrices of an adapter by the names of its tensors.

peft writes `base_model.model.<module>.lora_A.weight`. Other trainers leave the wrappers of torch.compile, of
distributed training or of activation checkpointing in the name, keep the adapter's own name before `weight`, or leave
out the prefix. None of this changes what is computed, so all these spellings are read alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "base_model.model."
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
"""Parts that torch.compile, FSDP, activation checkpointing and DistributedDataParallel add to a name."""

_MATRIX = re.compile(
    r"^(?P<module>.+)\.(?:lora_(?P<part>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<row>[AB])(?:\.[^.]+)?)$"
)
_WHOLE = re.compile(r"^(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.weight$")


@dataclass(frozen=True, slots=True)
class Matrix:
    """What the name of a LoRA matrix says."""

    module: str
    part: str
    """A or B."""
    of_embedding: bool


def matrix_of(name: str) -> Matrix | None:
    """None for any tensor that is not a LoRA matrix."""
    found = _MATRIX.match(without_wrappers(name).removeprefix(PREFIX))
    if found is None:
        return None
    return Matrix(found["module"], found["part"] or found["row"], found["row"] is not None)


def whole_of(name: str) -> str | None:
    """The module whose whole weight a tensor would be; None for one that is no weight."""
    found = _WHOLE.match(without_wrappers(name).removeprefix(PREFIX))
    return found["module"] if found else None


def without_wrappers(name: str) -> str:
    """The name without the parts that wrappers of the model added, anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
