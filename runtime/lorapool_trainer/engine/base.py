"""The frozen base in plain weights: a transformers model, split into the trunk and the head, that computes packed rows.

No architecture is recognized by its name. The runtime's probe finds the linear layers that are called once with one row
for each token, and its attention function passes every layer's attention to `PackedAttention`. A self-check compares a
sequence that is packed behind another one with the stock model: a model that mixes neighbouring rows is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.errors import UnsupportedBaseError
from lorapool_runtime.engines.torch.model.key_map import KeyMap
from lorapool_runtime.engines.torch.model.load import (
    ATTENTION_KWARG,
    ATTENTION_NAME,
    checked_config,
    element_type,
    refusing,
    register_attention,
    stock_model,
)
from lorapool_runtime.engines.torch.model.probe import ProbeResult, adaptable, run_probe
from lorapool_trainer.engine.attention import PackedAttention
from lorapool_trainer.engine.pack import PackedRow, pack
from lorapool_trainer.engine.settings import Example

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of the self-check, relative to the largest logit: more rows may be added in another order."""


@dataclass(frozen=True, slots=True)
class FrozenBase:
    model: Any
    trunk: Any
    """The model without its output layer."""
    linears: dict[str, nn.Linear]
    """What LoRA can train, by name, in the model's order."""
    device: torch.device
    vocab_size: int
    max_positions: int

    def hidden(self, row: PackedRow) -> Any:
        """The trunk's output, whose `last_hidden_state` is [1, rows, hidden]."""
        return self.trunk(
            input_ids=row.ids[None],
            position_ids=row.positions[None],
            use_cache=False,
            **{ATTENTION_KWARG: PackedAttention(row.lengths, row.rows)},
        )

    def logits(self, output: Any, hidden: Tensor) -> Tensor:
        """Runs the model's own code behind the trunk. hidden: [1, rows, hidden] -> [rows, vocabulary]."""
        given = copy.copy(output)
        given["last_hidden_state"] = hidden
        with _instead_of_trunk(self.trunk, given):
            result: Tensor = self.model(
                input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long), use_cache=False
            ).logits
        return result[0]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))


@contextmanager
def _instead_of_trunk(trunk: nn.Module, output: Any) -> Iterator[None]:
    trunk.forward = lambda *_args, **_kwargs: output  # an attribute of the instance, which hides the method
    try:
        yield
    finally:
        del trunk.forward


def load_base(folder: str, *, dtype: str, device: torch.device) -> FrozenBase:
    """Loads the base in `folder`. Raises UnsupportedBaseError, and OSError or ValueError for a broken folder.

    dtype: float32, bfloat16, float16, or auto: as stored, where the device computes in it.
    """
    with refusing():
        config = checked_config(folder)
        return frozen_base(stock_model(folder, config, element_type(config, dtype, device), device))


def frozen_base(model: Any) -> FrozenBase:
    """Freezes a loaded model and prepares it for packed rows. Raises UnsupportedBaseError."""
    model.requires_grad_(False)
    model.eval()
    device = next(model.parameters()).device
    probe, calls = run_probe(model, device)
    trainable = {linear for group in adaptable(model, calls, KeyMap(model)).groups for linear in group}
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    base = FrozenBase(
        model=model,
        trunk=getattr(model, model.base_model_prefix),
        linears={name: module for name, module in model.named_modules() if module in trainable},
        device=device,
        vocab_size=probe.logits.shape[-1],
        max_positions=int(model.config.get_text_config().max_position_embeddings),
    )
    if not base.linears:
        raise UnsupportedBaseError("the base has no linear layers that LoRA could train")
    _check(base, probe)
    return base


def _check(base: FrozenBase, probe: ProbeResult) -> None:
    first, second = (_uncounted(probe.token_ids[begin:]) for begin in (3, 0))
    row = pack([[first, second]], 0, base.device)
    with torch.no_grad():
        output = base.hidden(row)
        logits = base.logits(output, output.last_hidden_state[:, len(first.ids) :]).float()
    off = float((logits - probe.logits).abs().max() / probe.logits.abs().max())
    if not off <= _TOLERANCE[base.model.dtype]:
        raise UnsupportedBaseError(
            f"a sequence that is packed behind another one gives other logits than by itself (off by {off:.1e} of the "
            "largest); this architecture mixes neighbouring rows and cannot be trained here"
        )


def _uncounted(ids: Sequence[int]) -> Example:
    return Example(tuple(ids), (False,) * len(ids))
