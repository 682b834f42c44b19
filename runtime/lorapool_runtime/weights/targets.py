"""The linear layers LoRA may target, grouped by the input they share. Pure.

`model` finds them, `slabs` lays memory out by them, `adapter_file` checks and arranges files by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_runtime.engines.interface import TargetShape


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Layers of the base with one and the same input (q/k/v, gate/up), so that their shrink product is shared."""

    modules: tuple[str, ...]
    """Full dotted names in the model."""
    in_features: int
    out_features: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.modules)

    def shapes(self) -> tuple[TargetShape, ...]:
        return tuple(
            TargetShape(module=module, in_features=self.in_features, out_features=out)
            for module, out in zip(self.modules, self.out_features, strict=True)
        )
