"""LoRA in training: the weights of a job, and what they add to the rows of the job's micro-batches.

A layer computes `y = base(x)` for all rows of a cycle. Then each segment adds `s · (x[a:b] Aᵀ) Bᵀ` to its own rows in
place, so that no number of one job ever meets a number of another: neither a NaN nor a change of rounding can reach a
neighbour. Gradients of A and B are added to buffers of the job, segment by segment, in the order in which a loop over
the micro-batches would add them. The arithmetic is that of `peft.tuners.lora.Linear`, operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapool_trainer.engine.dropout import Dropout

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraPair:
    """A [rank, in] and B [out, rank] of one linear layer, float32. Their `grad` is a buffer that is never replaced."""

    a: nn.Parameter
    b: nn.Parameter


class LoraWeights:
    """The weights of one job, by module, in the order in which peft makes them."""

    def __init__(self, pairs: Mapping[str, LoraPair], scale: float) -> None:
        self.pairs = dict(pairs)
        self.scale = scale
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def parameters(self) -> list[nn.Parameter]:
        return [weight for pair in self.pairs.values() for weight in (pair.a, pair.b)]

    def zero_grad(self) -> None:
        torch._foreach_zero_([weight.grad for weight in self.parameters() if weight.grad is not None])

    def named(self) -> dict[str, nn.Parameter]:
        names = (f"{name}.lora_{letter}" for name in self.pairs for letter in "AB")
        return dict(zip(names, self.parameters(), strict=True))


def initial_weights(linears: Mapping[str, nn.Linear], rank: int, scale: float, seed: int) -> LoraWeights:
    """New weights: B is zero, A is what peft draws after `torch.manual_seed(seed)`. Does not touch torch's own seed.

    peft makes two linear layers, which draw their weights, and then draws A again.
    """
    drawn = torch.Generator().manual_seed(seed)
    pairs: dict[str, LoraPair] = {}
    for name, linear in linears.items():
        a, b = torch.empty(rank, linear.in_features), torch.empty(linear.out_features, rank)
        for weight in (a, b, a):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=drawn)
        pairs[name] = _pair(a, b.zero_(), linear.weight.device)
    return LoraWeights(pairs, scale)


def weights_from(
    tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Linear], rank: int, scale: float
) -> LoraWeights:
    """Weights with the values of `<module>.lora_A` and `<module>.lora_B`. Raises ValueError unless exactly the targets
    have tensors of the right shapes."""
    shapes = {f"{name}.lora_A": (rank, linear.in_features) for name, linear in linears.items()}
    shapes |= {f"{name}.lora_B": (linear.out_features, rank) for name, linear in linears.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if different := sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)):
        name = different[0]
        raise ValueError(
            f"the adapter's tensor {name} has the shape {given.get(name)}, the job's rank and targets need "
            f"{shapes.get(name)}; use the rank and the target modules of the adapter that is continued"
        )
    pairs = {n: _pair(tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"], m.weight.device) for n, m in linears.items()}
    return LoraWeights(pairs, scale)


def peft_tensors(weights: LoraWeights) -> dict[str, Tensor]:
    """Copies on the CPU, by the names in peft's file."""
    return {f"{PEFT_PREFIX}{name}.weight": _copied(weight) for name, weight in weights.named().items()}


def from_peft_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)


def _pair(a: Tensor, b: Tensor, device: torch.device) -> LoraPair:
    return LoraPair(*(nn.Parameter(weight.detach().to(device, torch.float32, copy=True)) for weight in (a, b)))


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Rows [begin, end) of a cycle, to which a job's weights belong."""

    begin: int
    end: int
    weights: LoraWeights
    dropout: Dropout | None = None


class LoraCycle:
    """The rows of the cycle that is being computed; the hooks of the base's layers read it."""

    def __init__(self) -> None:
        self._rows: Sequence[LoraRows] = ()
        self._hooks: dict[str, Any] = {}
        self._anchor = torch.zeros((), requires_grad=True)  # lets autograd begin at the first layer with LoRA

    def hook(self, name: str, linear: nn.Linear) -> None:
        """Lets a layer add LoRA from now on; repeated calls change nothing."""
        if name not in self._hooks:
            self._hooks[name] = linear.register_forward_hook(lambda _, args, output: self._add(name, args[0], output))

    @contextmanager
    def computing(self, rows: Sequence[LoraRows]) -> Iterator[None]:
        """Lets the base's layers add LoRA to these rows."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = ()

    def _add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        rows = [each for each in self._rows if name in each.weights.pairs]
        if not rows:
            return y
        added: Tensor = _AddLora.apply(y, x, self._anchor, name, rows)
        return added


class _AddLora(torch.autograd.Function):
    """y [1, rows, out] is changed in place; x [1, rows, in] is its layer's input, shared with other layers."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, _anchor: Tensor, name: str, rows: Sequence[LoraRows]) -> Tensor:
        ctx.mark_dirty(y)
        outputs, hidden = y.view(-1, y.shape[-1]), []
        for each in rows:
            pair = each.weights.pairs[name]
            hidden.append(_inputs(x, name, each) @ pair.a.t())
            outputs[each.begin : each.end] += (hidden[-1] @ pair.b.t()).mul_(each.weights.scale)
        ctx.save_for_backward(x, *hidden)
        ctx.name, ctx.rows = name, rows
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *hidden = ctx.saved_tensors
        name, needs_x = ctx.name, ctx.needs_input_grad[1]
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        x_gradient = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
        for each, h in zip(ctx.rows, hidden, strict=True):
            h_gradient = _accumulate(each, name, gradient[each.begin : each.end], h, x)
            if x_gradient is not None:
                into = x_gradient.view(-1, x.shape[-1])[each.begin : each.end]
                _input_gradient(into, h_gradient, name, each)
        return gradients[0], x_gradient, None, None, None


def _inputs(x: Tensor, name: str, rows: LoraRows) -> Tensor:
    """float32 [end - begin, in]: what the job's A is applied to."""
    own = x.reshape(-1, x.shape[-1])[rows.begin : rows.end].float()
    return own if rows.dropout is None else own * rows.dropout.scale(name, x.shape[-1])


def _accumulate(rows: LoraRows, name: str, gradient: Tensor, hidden: Tensor, x: Tensor) -> Tensor:
    """Adds the gradients of A and B to the job's buffers and returns that of the hidden values, [end - begin, rank]."""
    pair = rows.weights.pairs[name]
    assert pair.a.grad is not None
    assert pair.b.grad is not None
    scaled = gradient.float() * rows.weights.scale
    pair.b.grad += scaled.t() @ hidden
    hidden_gradient = scaled @ pair.b
    pair.a.grad += hidden_gradient.t() @ _inputs(x, name, rows)
    return hidden_gradient


def _input_gradient(into: Tensor, hidden_gradient: Tensor, name: str, rows: LoraRows) -> None:
    own = hidden_gradient @ rows.weights.pairs[name].a
    into.copy_(own if rows.dropout is None else own * rows.dropout.scale(name, into.shape[-1]))
