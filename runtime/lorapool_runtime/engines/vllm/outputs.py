"""vLLM's outputs of one request as the interface's: one `TokenOutput` per token. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorapool_runtime.engines.interface import (
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    TokenOutput,
    ending,
)

_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(slots=True)
class Outputs:
    """The outputs of one request so far."""

    request: GenerationRequest
    stop_ids: frozenset[int]
    """Tokens that end the sequence and are not part of its text."""
    generated: int = 0
    cached_tokens: int = 0

    def of(self, output: Any) -> Iterator[TokenOutput]:
        """The outputs for what vLLM returned since the last call (`RequestOutputKind.DELTA`)."""
        [completion] = output.outputs
        self.cached_tokens = max(self.cached_tokens, output.num_cached_tokens or 0)
        scores = self._prompt_logprobs(output)
        if self.request.sampling.max_tokens == 0:  # one token was asked for, since vLLM generates at least one
            if output.finished:
                yield self._output(None, FinishReason.LENGTH, None, scores)
            return
        reason = _REASONS.get(completion.finish_reason or "", FinishReason.ERROR) if output.finished else None
        tokens = list(completion.token_ids)
        logprobs = completion.logprobs or [None] * len(tokens)
        for number, (token, found) in enumerate(zip(tokens, logprobs, strict=True), 1):
            self.generated += 1
            last = number == len(tokens)
            yield self._output(token, reason if last else None, found, scores)
            scores = None
        if reason is not None and not tokens:
            message = None if reason is not FinishReason.ERROR else f"vLLM ended it: {completion.finish_reason}"
            yield self.end(reason, message)

    def end(self, reason: FinishReason, message: str | None) -> TokenOutput:
        """The end of the request without a token."""
        return ending(self.request, self.generated, reason, message, cached=self.cached_tokens)

    def _output(
        self, token: int | None, reason: FinishReason | None, found: Any, scores: tuple[TokenLogprob, ...] | None
    ) -> TokenOutput:
        is_end = reason is FinishReason.STOP and token in self.stop_ids
        return TokenOutput(
            request_id=self.request.request_id,
            token_id=token,
            text_token=token is not None and not is_end,
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=self.generated,
            cached_tokens=self.cached_tokens,
            finish_reason=reason,
            logprob=None if token is None else _logprob(token, found, self.request.sampling.top_logprobs),
            prompt_logprobs=scores,
        )

    def _prompt_logprobs(self, output: Any) -> tuple[TokenLogprob, ...] | None:
        count = self.request.prompt_logprobs
        if count is None or output.prompt_logprobs is None or self.generated:
            return None
        return tuple(_logprobs(self.request.prompt_ids[1:], output.prompt_logprobs[1:], count))


def _logprobs(tokens: Sequence[int], found: Sequence[Any], count: int) -> Iterator[TokenLogprob]:
    for token, one in zip(tokens, found, strict=True):
        made = _logprob(token, one, count)
        assert made is not None
        yield made


def _logprob(token: int, found: Mapping[int, Any] | None, count: int | None) -> TokenLogprob | None:
    """found: by token id, of the token and of the likeliest ones."""
    if count is None or found is None:
        return None
    likeliest = sorted(((one.logprob, other) for other, one in found.items()), key=lambda pair: -pair[0])[:count]
    return TokenLogprob(token, found[token].logprob, tuple((other, value) for value, other in likeliest))
