"""Samples the tokens of a step, each row by the parameters of its own request only.

Greedy rows share one batched maximum. The other rows go through operators that treat each row separately (batched on
a GPU) and are drawn with a uniform number derived from (seed, position), so the same seed gives the same text whatever
else is in the batch. Penalties, biases and constraints change only the rows that have them. A row whose logits are not
finite, or whose constraint fails, gets no token, and the engine ends that request with an error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapool_runtime.engines.interface import ConstraintError, SamplingParams, TokenConstraint, TokenLogprob

_GREEDY_BELOW = 1e-5
"""A temperature below this is greedy, because dividing by it would overflow."""
_NOT_FINITE = "the model's output is not finite"


@dataclass(frozen=True, slots=True)
class SampleRow:
    params: SamplingParams
    seed: int
    position: int
    """The number of tokens that the request has generated so far."""
    prompt_ids: Sequence[int]
    generated_counts: Mapping[int, int]
    constraint: TokenConstraint | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None
    """Why there is no token; None where there is one."""


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One result per row. logits: [rows, vocabulary], any floating type."""
    logits = logits.float()  # a bf16 maximum is slower than the cast and an fp32 one
    peaks, likeliest = logits.max(dim=-1)  # [rows]; the maximum of a row with NaN is NaN
    finite, tokens = torch.isfinite(peaks).tolist(), likeliest.tolist()
    errors = {i: _NOT_FINITE for i, is_finite in enumerate(finite) if not is_finite}
    shaped = logits
    special = [i for i, row in enumerate(rows) if i not in errors and _is_shaped(row)]
    if special:
        own = logits[special]  # a copy: log-probabilities are computed from the model's own logits
        errors |= _shape(own, special, rows)
        shaped = logits.index_copy(0, torch.tensor(special, device=logits.device), own)
        for i, token in zip(special, own.argmax(dim=-1).tolist(), strict=True):
            tokens[i] = token
    drawn = [i for i, row in enumerate(rows) if row.params.temperature >= _GREEDY_BELOW and i not in errors]
    if drawn:
        chosen = shaped if len(drawn) == len(rows) else shaped[drawn]
        for i, token in zip(drawn, _draw(chosen, [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    logprobs = _wanted_logprobs(logits, rows, tokens, errors)
    return [
        Sampled(None, error=errors[i]) if i in errors else Sampled(token, logprobs.get(i))
        for i, token in enumerate(tokens)
    ]


# --- biases, penalties, constraints ------------------------------------------------------------


def _is_shaped(row: SampleRow) -> bool:
    params = row.params
    penalized = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return bool(params.logit_bias or penalized or row.constraint is not None)


def _shape(own: Tensor, special: Sequence[int], rows: Sequence[SampleRow]) -> dict[int, str]:
    """Applies penalties, biases and constraints to own: [special rows, vocabulary] in place.

    Returns the error of each row that can have no token.
    """
    errors: dict[int, str] = {}
    masks: list[bytes] = []
    masked: list[int] = []  # row numbers within `own`
    for number, i in enumerate(special):
        _penalize(own[number], rows[i])
        constraint = rows[i].constraint
        if constraint is not None:
            try:
                masks.append(constraint.mask())
            except ConstraintError as error:
                errors[i] = str(error)
            else:
                masked.append(number)
    if masks:
        allowed = _unpacked(masks, own.shape[1], own.device)
        own[masked] = own[masked].masked_fill_(~allowed, float("-inf"))
        for number, any_allowed in zip(masked, allowed.any(dim=-1).tolist(), strict=True):
            if not any_allowed:
                errors[special[number]] = "the constraint allows no further token"
    return errors


def _penalize(logits: Tensor, row: SampleRow) -> None:
    """Applies the bias, then the repetition penalty (on prompt and text, as transformers does), then the presence and
    frequency penalties (on the generated text only)."""
    params, device = row.params, logits.device
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=device)
        logits[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=device)
    if params.repetition_penalty != 1:
        tokens = torch.tensor(sorted({*row.prompt_ids, *row.generated_counts}), device=device)
        before = logits[tokens]
        logits[tokens] = torch.where(before > 0, before / params.repetition_penalty, before * params.repetition_penalty)
    if row.generated_counts and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(row.generated_counts), device=device)
        counts = torch.tensor(list(row.generated_counts.values()), dtype=logits.dtype, device=device)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts


def _unpacked(masks: Sequence[bytes], vocabulary: int, device: torch.device) -> Tensor:
    """Unpacks one bit per token, lowest bit first, into bool [rows, vocabulary]."""
    width = -(-vocabulary // 8)
    packed = bytearray(b"".join(mask[:width].ljust(width, b"\0") for mask in masks))
    octets = torch.frombuffer(packed, dtype=torch.uint8).to(device).view(len(masks), width, 1)
    bits = octets.bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=device)).bitwise_and(1)
    return bits.view(len(masks), width * 8)[:, :vocabulary].bool()


# --- drawing -----------------------------------------------------------------------------------


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Draws a token per row: the one at fraction `u` of the cumulative probabilities. logits: [rows, vocabulary]."""
    if logits.device.type == "cpu" and len(rows) > 1:  # one row at a time stays in the processor's cache
        return [_draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    probabilities = _filtered(logits, [row.params for row in rows])
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    u = _column([uniform(row.seed, row.position) for row in rows], logits.device)
    total = cumulated[:, -1:]
    target = torch.minimum(total * u, total.nextafter(torch.zeros_like(total)))  # rounding must not exceed the last
    return torch.searchsorted(cumulated, target, right=True)[:, 0].tolist()


def _filtered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [rows, vocabulary] after temperature, top-k, min-p and top-p; not normalized.

    Tokens that are as likely as the last one kept are kept too, so that the result never depends on the order of ties.
    """
    device = logits.device
    temperatures = _column([one.temperature for one in params], device).to(logits.dtype)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures  # the likeliest token is at 0
    floor = _top_k_floor(scaled, params)
    if any(one.min_p for one in params):
        least = _column([math.log(one.min_p) if one.min_p else -math.inf for one in params], device).to(scaled.dtype)
        floor = least if floor is None else torch.maximum(floor, least)
    if floor is not None:
        scaled = scaled.masked_fill_(scaled < floor, float("-inf"))
    probabilities = torch.softmax(scaled, dim=-1)
    nucleus = [i for i, one in enumerate(params) if one.top_p < 1]
    if nucleus:
        shares = _column([params[i].top_p for i in nucleus], device)
        least_kept = torch.zeros(len(params), 1, dtype=probabilities.dtype, device=device)
        least_kept[nucleus] = _nucleus_floor(probabilities[nucleus], shares)
        probabilities = probabilities.masked_fill_(probabilities < least_kept, 0.0)
    return probabilities


def _top_k_floor(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    """[rows, 1]: the k-th largest value of rows with a top-k, -inf for the others; None when no row has one."""
    vocabulary = scaled.shape[1]
    ks = [one.top_k if 0 < one.top_k < vocabulary else 0 for one in params]
    if not any(ks):
        return None
    largest = scaled.topk(max(ks), dim=-1).values
    at = torch.tensor([[max(k - 1, 0)] for k in ks], device=scaled.device)
    has_top_k = torch.tensor([[k > 0] for k in ks], device=scaled.device)
    return largest.gather(1, at).masked_fill(~has_top_k, float("-inf"))


def _nucleus_floor(probabilities: Tensor, shares: Tensor) -> Tensor:
    """[rows, 1]: the least probability in the smallest set of tokens that reaches the row's share."""
    if len(probabilities) == 1:  # tokens below (1 - share) / vocabulary are never needed to reach the share
        least = (1 - shares[0, 0]) / probabilities.shape[1]
        probabilities = probabilities[probabilities >= least][None]
    ordered = probabilities.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    kept = (before < shares).sum(dim=-1, keepdim=True)  # [rows, 1]
    return ordered.gather(1, kept - 1)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    """[rows, 1] in double precision."""
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def uniform(seed: int, position: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on the arguments, equal on every machine."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


# --- log-probabilities -------------------------------------------------------------------------


def _wanted_logprobs(
    logits: Tensor, rows: Sequence[SampleRow], tokens: Sequence[int], errors: Mapping[int, str]
) -> dict[int, TokenLogprob]:
    """By row, from the model's own distribution: before bias, penalties and temperature."""
    wanted: dict[int, list[int]] = {}  # rows by the number of likeliest tokens they request
    for i, row in enumerate(rows):
        if row.params.top_logprobs is not None and i not in errors:
            wanted.setdefault(row.params.top_logprobs, []).append(i)
    return {
        i: one
        for count, group in wanted.items()
        for i, one in zip(group, token_logprobs(logits[group], [tokens[i] for i in group], count), strict=True)
    }


def token_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probabilities of each row's token and of its `count` likeliest ones.

    logits: [at least len(tokens), vocabulary].
    """
    logprobs = torch.log_softmax(logits[: len(tokens)].float(), dim=-1)
    ids = torch.tensor(tokens, device=logits.device)[:, None]
    own = logprobs.gather(1, ids)[:, 0].tolist()
    if not count:
        return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
    values, likeliest = logprobs.topk(count, dim=-1)
    tops = zip(likeliest.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(*top, strict=True)))
        for token, value, top in zip(tokens, own, tops, strict=True)
    ]
