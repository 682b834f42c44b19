"""Samples the tokens of a step, each row by the parameters of its own request only.

Greedy rows share one batched maximum. The other rows go through operators that treat each row separately (batched on
a GPU) and are drawn with a uniform number derived from (seed, position), so the same seed gives the same text whatever
else is in the batch. Penalties, biases and constraints change only the rows that have them. A row whose logits are not
finite, or whose constraint fails, gets no token, and the engine ends that request with an error. `launch` only queues
work on a GPU: the step waits for it once, when the tokens are fetched.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.interface import ConstraintError, SamplingParams, TokenConstraint, TokenLogprob
from lorapool_runtime.engines.torch.transfers import fetch, to_device

_GREEDY_BELOW = 1e-5
"""A temperature below this is greedy, because dividing by it would overflow."""
_NOT_FINITE = "the model's output is not finite"


class LogitShaper:
    """Applies one request's bias and penalties to its logits. What it needs stays on the logits' device.

    A step copies no more than the request's new tokens there.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._bias: tuple[Tensor, Tensor] | None = None  # tokens int64 [biases], values float32 [biases]
        self._tokens: Tensor  # int64 [capacity], each distinct token so far; made at the first step, on its device
        self._counts: Tensor  # float32 [capacity], how often the text has it; 0 for tokens of the prompt alone
        self._places: dict[int, int] = {}  # token -> its place in both
        self._seen = 0

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return bool(params.logit_bias) or _penalizes(params)

    def apply(self, logits: Tensor, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Changes logits, float32 [vocabulary], in place. tokens: of the prompt, of which there are `prompt_tokens`,
        and of the text so far.

        The bias comes first, then the repetition penalty (on prompt and text, as transformers does), then the presence
        and frequency penalties (on the text only).
        """
        params = self._params
        if params.logit_bias:
            at, values = self._bias = self._bias or (
                to_device(list(params.logit_bias), torch.int64, logits.device),
                to_device(list(params.logit_bias.values()), torch.float32, logits.device),
            )
            logits.index_add_(0, at, values)
        if not _penalizes(params):
            return
        self._update(tokens, prompt_tokens, logits.device)
        at, counts = self._tokens[: len(self._places)], self._counts[: len(self._places)]
        shaped = logits.index_select(0, at)
        if params.repetition_penalty != 1:
            factor = params.repetition_penalty
            shaped = torch.where(shaped > 0, shaped / factor, shaped * factor)
        if params.presence_penalty or params.frequency_penalty:
            shaped = shaped - (params.presence_penalty * (counts > 0) + params.frequency_penalty * counts)
        logits.index_copy_(0, at, shaped)

    def _update(self, tokens: Sequence[int], prompt_tokens: int, device: torch.device) -> None:
        if not self._seen:
            self._begin(tokens, prompt_tokens, device)
        for token in tokens[self._seen :]:  # one, as a rule
            place = self._places.setdefault(token, len(self._places))
            self._tokens.select(0, place).fill_(token)
            self._counts.select(0, place).add_(1)
        self._seen = len(tokens)

    def _begin(self, tokens: Sequence[int], prompt_tokens: int, device: torch.device) -> None:
        counts = Counter(tokens[prompt_tokens:])
        distinct = list(dict.fromkeys(tokens))
        self._places = {token: place for place, token in enumerate(distinct)}
        room = [0] * self._params.max_tokens
        self._tokens = to_device(distinct + room, torch.int64, device)
        self._counts = to_device([counts[token] for token in distinct] + room, torch.float32, device)
        self._seen = len(tokens)


def _penalizes(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


@dataclass(frozen=True, slots=True)
class SampleRow:
    params: SamplingParams
    seed: int
    position: int
    """The number of tokens that the request has generated so far."""
    tokens: Sequence[int]
    """Of the prompt, then of the text so far."""
    prompt_tokens: int
    shaper: LogitShaper | None = None
    """The request's own, where it has a bias or a penalty."""
    constraint: TokenConstraint | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None
    """Why there is no token; None where there is one."""


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One result per row. logits: [rows, vocabulary], any floating type."""
    launched = launch(logits, rows)
    return launched.results(fetch(launched.tensors))


@dataclass(frozen=True, slots=True)
class Launched:
    """Sampling of one step, queued on the device. Its caller fetches `tensors`, together with whatever else it "
    "needs."""

    tensors: tuple[Tensor, ...]
    """Tokens [rows] and whether each row is finite [rows], then of each group in `groups` its log-probabilities [rows
    of the group] and, unless its count is 0, the likeliest tokens and their values, [rows of the group, count]."""
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    """The number of likeliest tokens, and the rows that asked for so many."""
    errors: Mapping[int, str]

    def results(self, fetched: Sequence[Any]) -> list[Sampled]:
        """fetched: the values of `tensors`."""
        tokens, finite, *rest = fetched
        errors = {i: _NOT_FINITE for i, is_finite in enumerate(finite) if not is_finite} | dict(self.errors)
        logprobs: dict[int, TokenLogprob] = {}
        values = iter(rest)
        for count, group in self.groups:
            found = [next(values) for _ in range(3 if count else 1)]
            logprobs |= zip(group, _paired([tokens[i] for i in group], *found), strict=True)
        return [
            Sampled(None, error=errors[i]) if i in errors else Sampled(token, logprobs.get(i))
            for i, token in enumerate(tokens)
        ]


def launch(logits: Tensor, rows: Sequence[SampleRow]) -> Launched:
    """Queues the sampling of one step and waits for nothing; masks of constraints are computed meanwhile.

    logits: [rows, vocabulary], any floating type. On a CPU everything is computed when it returns.
    """
    logits = logits.float()  # a bf16 maximum is slower than the cast and an fp32 one
    device = logits.device
    peaks, tokens = logits.max(dim=-1)  # [rows]; the maximum of a row with NaN is NaN
    finite = torch.isfinite(peaks)
    errors: dict[int, str] = {}
    shaped = logits
    special = [i for i, row in enumerate(rows) if _is_shaped(row)]
    if special:
        at = to_device(special, torch.int64, device)
        own = logits.index_select(0, at)  # a copy: log-probabilities are computed from the model's own logits
        errors = _shape(own, special, rows)
        peaks, likeliest = own.max(dim=-1)
        finite = finite.index_copy(0, at, torch.isfinite(peaks) & finite.index_select(0, at))
        shaped, tokens = logits.index_copy(0, at, own), tokens.index_copy(0, at, likeliest)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature >= _GREEDY_BELOW and i not in errors]
    if drawn:
        at = to_device(drawn, torch.int64, device)
        chosen = shaped if len(drawn) == len(rows) else shaped.index_select(0, at)
        sound = finite.index_select(0, at)[:, None]
        if device.type != "cpu" or not bool(
            sound.all()
        ):  # what is not finite would become an index outside of the rows
            chosen = chosen.masked_fill(~sound, 0.0)
        tokens = tokens.index_copy(0, at, _draw(chosen, [rows[i] for i in drawn]))
    groups = _wanted_logprobs(rows)
    wanted = [one for count, group in groups for one in _logprobs(logits, tokens, group, count)]
    return Launched((tokens, finite, *wanted), groups, errors)


# --- biases, penalties, constraints ------------------------------------------------------------


def _is_shaped(row: SampleRow) -> bool:
    return row.constraint is not None or LogitShaper.needed(row.params)


def _shape(own: Tensor, special: Sequence[int], rows: Sequence[SampleRow]) -> dict[int, str]:
    """Applies biases, penalties and constraints to own: [special rows, vocabulary] in place.

    Returns the error of each row that can have no token.
    """
    errors: dict[int, str] = {}
    masks: list[bytes] = []
    masked: list[int] = []  # row numbers within `own`
    for number, i in enumerate(special):
        row = rows[i]
        if LogitShaper.needed(row.params):
            (row.shaper or LogitShaper(row.params)).apply(own[number], row.tokens, row.prompt_tokens)
        if row.constraint is not None:
            try:
                masks.append(_fitted(row.constraint.mask(), own.shape[1]))
            except ConstraintError as error:
                errors[i] = str(error)
                continue
            masked.append(number)
            if not any(masks[-1]):
                errors[i] = "the constraint allows no further token"
    for number, allowed in zip(masked, _unpacked(masks, own.shape[1], own.device), strict=True):
        own[number].masked_fill_(~allowed, float("-inf"))
    return errors


def _fitted(mask: bytes, vocabulary: int) -> bytes:
    """The mask with one bit for each token of the vocabulary, the rest of the last byte 0."""
    width, rest = -(-vocabulary // 8), vocabulary % 8
    fitted = mask[:width].ljust(width, b"\0")
    return fitted[:-1] + bytes([fitted[-1] & ((1 << rest) - 1)]) if rest else fitted


def _unpacked(masks: Sequence[bytes], vocabulary: int, device: torch.device) -> Tensor:
    """Unpacks one bit per token, lowest bit first, into bool [rows, vocabulary]."""
    width = -(-vocabulary // 8)
    packed = np.frombuffer(bytearray(b"".join(masks)), dtype=np.uint8)
    octets = to_device(packed, torch.uint8, device).view(len(masks), width, 1)
    bits = octets.bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=device)).bitwise_and(1)
    return bits.view(len(masks), width * 8)[:, :vocabulary].bool()


# --- drawing -----------------------------------------------------------------------------------


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Draws a token per row, int64 [rows]: the one at fraction `u` of the cumulative probabilities. logits: [rows,
    vocabulary], finite or -inf."""
    if logits.device.type == "cpu" and len(rows) > 1:  # one row at a time stays in the processor's cache
        return torch.cat([_draw(logits[i : i + 1], rows[i : i + 1]) for i in range(len(rows))])
    probabilities = _filtered(logits, [row.params for row in rows])
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    u = _column([uniform(row.seed, row.position) for row in rows], logits.device)
    total = cumulated[:, -1:]
    target = torch.minimum(total * u, total.nextafter(torch.zeros_like(total)))  # rounding must not exceed the last
    return torch.searchsorted(cumulated, target, right=True)[:, 0]


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
        at = to_device(nucleus, torch.int64, device)
        shares = _column([params[i].top_p for i in nucleus], device)
        floors = _nucleus_floor(probabilities.index_select(0, at), shares)
        least_kept = torch.zeros(len(params), 1, dtype=probabilities.dtype, device=device).index_copy_(0, at, floors)
        probabilities = probabilities.masked_fill_(probabilities < least_kept, 0.0)
    return probabilities


def _top_k_floor(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    """[rows, 1]: the k-th largest value of rows with a top-k, -inf for the others; None when no row has one."""
    vocabulary = scaled.shape[1]
    ks = [one.top_k if 0 < one.top_k < vocabulary else 0 for one in params]
    if not any(ks):
        return None
    largest = scaled.topk(max(ks), dim=-1).values
    at = to_device([[max(k - 1, 0)] for k in ks], torch.int64, scaled.device)
    has_top_k = to_device([[k > 0] for k in ks], torch.bool, scaled.device)
    return largest.gather(1, at).masked_fill(~has_top_k, float("-inf"))


def _nucleus_floor(probabilities: Tensor, shares: Tensor) -> Tensor:
    """[rows, 1]: the least probability in the smallest set of tokens that reaches the row's share."""
    if len(probabilities) == 1 and probabilities.device.type == "cpu":
        # tokens below (1 - share) / vocabulary are never needed to reach the share
        least = (1 - shares[0, 0]) / probabilities.shape[1]
        probabilities = probabilities[probabilities >= least][None]
    ordered = probabilities.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    kept = (before < shares).sum(dim=-1, keepdim=True)  # [rows, 1]
    return ordered.gather(1, kept - 1)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    """[rows, 1] in double precision."""
    return to_device(values, torch.float64, device)[:, None]


def uniform(seed: int, position: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on the arguments, equal on every machine."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


# --- log-probabilities -------------------------------------------------------------------------


def _wanted_logprobs(rows: Sequence[SampleRow]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The numbers of rows by the number of likeliest tokens that they ask for."""
    wanted: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.params.top_logprobs is not None:
            wanted.setdefault(row.params.top_logprobs, []).append(i)
    return tuple((count, tuple(group)) for count, group in wanted.items())


def _logprobs(logits: Tensor, tokens: Tensor, group: Sequence[int], count: int) -> tuple[Tensor, ...]:
    """From the model's own distribution, before bias, penalties and temperature: the log-probability of each row's
    token [rows of the group] and, unless `count` is 0, the likeliest tokens and their values [rows of the group,
    count]."""
    at = to_device(group, torch.int64, logits.device)
    logprobs = torch.log_softmax(logits.index_select(0, at), dim=-1)
    own = logprobs.gather(1, tokens.index_select(0, at)[:, None])[:, 0]
    if not count:
        return (own,)
    values, likeliest = logprobs.topk(count, dim=-1)
    return own, likeliest, values


def token_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probabilities of each row's token and of its `count` likeliest ones.

    logits: [at least len(tokens), vocabulary].
    """
    on_device = to_device(tokens, torch.int64, logits.device)
    return _paired(tokens, *fetch(_logprobs(logits.float(), on_device, range(len(tokens)), count)))


def _paired(
    tokens: Sequence[int],
    own: Sequence[float],
    likeliest: Sequence[Sequence[int]] | None = None,
    values: Sequence[Sequence[float]] | None = None,
) -> list[TokenLogprob]:
    """What `_logprobs` returned, fetched."""
    if likeliest is None or values is None:
        return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
    return [
        TokenLogprob(token, value, tuple(zip(ids, of_ids, strict=True)))
        for token, value, ids, of_ids in zip(tokens, own, likeliest, values, strict=True)
    ]
