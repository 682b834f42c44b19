"""The layers that LoRA may target, grouped by the input they share. Pure.

The loader of the base finds them; slots and readers of adapters arrange matrices by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.base_modules import ModuleKind
from lorapool_runtime.engines.interface import TargetShape


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Layers of the base with the same input (q/k/v, gate/up), so that they share one shrink product."""

    modules: tuple[str, ...]
    """Full dotted names in the model."""
    in_features: int
    out_features: tuple[int, ...]
    kind: ModuleKind = ModuleKind.LINEAR
    experts: int = 1
    """Matrices in each module."""

    @property
    def by_kernel(self) -> bool:
        """Whether the LoRA kernels compute it; torch computes embeddings and experts."""
        return self.kind in (ModuleKind.LINEAR, ModuleKind.OUTPUT, ModuleKind.PARAMETER)

    @property
    def size(self) -> int:
        return len(self.modules)

    def shapes(self) -> tuple[TargetShape, ...]:
        return tuple(
            TargetShape(module=module, in_features=self.in_features, out_features=out)
            for module, out in zip(self.modules, self.out_features, strict=True)
        )
