"""From logits to tokens, each request by its own parameters and by nothing else.

The runner's last act in a step. Greedy rows share one batched maximum; the others are drawn one by one with a
uniform number made of (seed, position), so the same seed gives the same text whoever shares the batch. A row whose
logits are not finite gets no token: the engine ends that request with an error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapool_runtime.interface import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampleRow:
    params: SamplingParams
    seed: int
    position: int
    """How many tokens this request has generated so far."""
    prompt_ids: Sequence[int]
    generated_counts: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int | None
    """None: the logits were not finite."""
    logprob: TokenLogprob | None = None


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError naming the field and its bound."""
    for name, value, low, high in (
        ("temperature", params.temperature, 0.0, math.inf),
        ("top_p", params.top_p, 0.0, 1.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("top_k", params.top_k, 0, math.inf),
        ("repetition_penalty", params.repetition_penalty, 0.0, math.inf),
        ("presence_penalty", params.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", params.frequency_penalty, -math.inf, math.inf),
    ):
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{name} must be finite and within [{low:g}, {high:g}], not {value}")
    if params.repetition_penalty == 0 or params.top_p == 0:
        raise ValueError("repetition_penalty and top_p must be above 0")
    if params.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {params.max_tokens}")
    if params.top_logprobs is not None and not 0 <= params.top_logprobs <= vocab_size:
        raise ValueError(f"top_logprobs must be within [0, {vocab_size}], not {params.top_logprobs}")
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias names token {token}; the vocabulary ends at {vocab_size - 1}")
        if not math.isfinite(bias):
            raise ValueError(f"logit_bias of token {token} must be finite, not {bias}")


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """logits: [rows, vocabulary], any floating type."""
    logits = logits.float()  # a bf16 maximum is slower than the cast and an fp32 one
    peaks, likeliest = logits.max(dim=-1)  # [rows]; the maximum of a row with NaN is NaN
    finite, greedy = torch.isfinite(peaks).tolist(), likeliest.tolist()
    return [_one(logits[i], row, greedy[i]) if finite[i] else Sampled(token_id=None) for i, row in enumerate(rows)]


def _one(logits: Tensor, row: SampleRow, likeliest: int) -> Sampled:
    params = row.params
    shaped = _penalized(logits, row) if _is_shaped(params) else logits
    if params.temperature == 0:
        token = likeliest if shaped is logits else int(shaped.argmax())
    else:
        token = _draw(_filtered(shaped, params), uniform(row.seed, row.position))
    if params.top_logprobs is None:
        return Sampled(token)
    return Sampled(token, _logprob(logits, token, params.top_logprobs))


def _is_shaped(params: SamplingParams) -> bool:
    penalized = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return bool(params.logit_bias or penalized)


def _penalized(logits: Tensor, row: SampleRow) -> Tensor:
    """Bias, then repetition (prompt and text, as transformers does), then presence and frequency (text only)."""
    logits, params, device = logits.clone(), row.params, logits.device
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=device)
        logits[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=device)
    if params.repetition_penalty != 1:
        tokens = torch.tensor(sorted({*row.prompt_ids, *row.generated_counts}), device=device)
        seen = logits[tokens]
        logits[tokens] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if row.generated_counts and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(row.generated_counts), device=device)
        counts = torch.tensor(list(row.generated_counts.values()), dtype=logits.dtype, device=device)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def _filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """[vocabulary] probabilities after temperature, top-k, min-p and top-p; not normalized."""
    scaled = (logits - logits.max()) / params.temperature
    if 0 < params.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(params.top_k).values[-1], float("-inf"))
    probabilities = torch.softmax(scaled, dim=-1)
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    if params.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0, dtype=torch.float64) - ordered
        probabilities = probabilities.clone()
        probabilities[tokens[before >= params.top_p * ordered.sum(dtype=torch.float64)]] = 0.0
    return probabilities


def _draw(probabilities: Tensor, u: float) -> int:
    """The token at fraction `u` of the cumulated probabilities, in order of the vocabulary."""
    cumulated = probabilities.cumsum(0, dtype=torch.float64)
    target = (cumulated[-1] * u).reshape(1)
    return min(int(torch.searchsorted(cumulated, target, right=True)), len(probabilities) - 1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, on any machine."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Of the model's own distribution, before bias, penalties and temperature."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, tokens = logprobs.topk(count)
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id=token, logprob=float(logprobs[token]), top=top)
