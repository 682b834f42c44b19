"""Finds the LoRA matrices of an adapter by the names of its tensors.

peft writes `base_model.model.<module>.lora_A.weight`. Other trainers leave the wrappers of torch.compile, of
distributed training or of activation checkpointing in the name, keep the adapter's own name before `weight`, or leave
out the prefix. None of this changes what is computed, so all these spellings are read alike.
"""

from __future__ import annotations

import re

PREFIX = "base_model.model."
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
"""Parts that torch.compile, FSDP, activation checkpointing and DistributedDataParallel add to a name."""

_PAIR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight$")


def pair_of(name: str) -> tuple[str, str] | None:
    """Tensor name → (module, "A" or "B"); None for any tensor that is not a LoRA matrix."""
    match = _PAIR.match(without_wrappers(name))
    return (match["module"].removeprefix(PREFIX), match["part"]) if match else None


def without_wrappers(name: str) -> str:
    """The name without the parts that wrappers of the model added, anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
