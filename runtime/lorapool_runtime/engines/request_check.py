"""Refuses requests that can never run: the rules that all engines share. Pure, for any thread."""

from __future__ import annotations

import math

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, ModelFacts, SamplingParams


def check_request(request: GenerationRequest, facts: ModelFacts, *, slots: int) -> None:
    """Raises ValueError that names what is out of bounds, for all bounds but the size of the KV cache."""
    prompt, params = request.prompt_ids, request.sampling
    check_params(params, facts.vocab_size)
    if request.prompt_logprobs is not None and not 0 <= request.prompt_logprobs <= facts.vocab_size:
        raise ValueError(f"prompt_logprobs must be within [0, {facts.vocab_size}], not {request.prompt_logprobs}")
    if not prompt:
        raise ValueError("the prompt has no tokens")
    if len(prompt) + params.max_tokens > facts.max_model_len:
        raise ValueError(
            f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} exceed "
            f"the model's {facts.max_model_len} tokens"
        )
    if min(prompt) < 0 or max(prompt) >= facts.vocab_size:
        raise ValueError(f"the prompt has a token outside [0, {facts.vocab_size - 1}]")
    if not BASE_SLOT <= request.slot < slots:
        raise ValueError(f"there is no slot {request.slot}")


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError that names the field and its bound."""
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
    if params.max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, not {params.max_tokens}")
    if params.min_tokens and not 0 < params.min_tokens <= params.max_tokens:
        raise ValueError(f"min_tokens must be within [0, max_tokens {params.max_tokens}], not {params.min_tokens}")
    if params.top_logprobs is not None and not 0 <= params.top_logprobs <= vocab_size:
        raise ValueError(f"top_logprobs must be within [0, {vocab_size}], not {params.top_logprobs}")
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias has token {token}, but the last token of the vocabulary is {vocab_size - 1}")
        if not math.isfinite(bias):
            raise ValueError(f"logit_bias of token {token} must be finite, not {bias}")
