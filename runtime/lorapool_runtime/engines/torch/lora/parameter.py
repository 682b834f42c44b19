"""LoRA on a matrix that is a parameter of its module, such as the router of a mixture of experts.

The module's own code multiplies with it, so that the tensor itself adds the adapters to each product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorapool_runtime.engines.torch.lora.layer import LoraBatch


class LoraWeight(Tensor):
    """A weight whose products by `F.linear` get the LoRA of their rows; everywhere else a plain tensor."""

    number: int
    batch: LoraBatch

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func is F.linear and len(args) > 1 and isinstance(args[1], cls):
                weight = args[1]
                x = args[0].reshape(-1, args[0].shape[-1]).contiguous()
                weight.batch.add(weight.number, x, result.view(-1, result.shape[-1]))
        return result


def replace_parameter(module: nn.Module, number: int, batch: LoraBatch) -> int:
    """Replaces `module.weight`. Returns its bytes, which are no longer those of a parameter."""
    weight: Any = module.weight
    own = weight.detach().as_subclass(LoraWeight)
    own.number, own.batch = number, batch
    del module.weight
    module.weight = own
    return int(own.nbytes)
