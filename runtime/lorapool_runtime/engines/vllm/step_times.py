"""The time between two deliveries of vLLM's outputs, divided among the requests that got tokens. Pure.

vLLM does not say which requests a step computed, nor how long it took. So all the time between two deliveries goes to
the requests of the later one: a prompt that takes several steps is counted when its first token comes, with the weight
of all its tokens, and the others that got tokens meanwhile bear the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorapool_runtime.engines.interface import StepTime, TokenOutput
from lorapool_runtime.engines.step_shares import StepWeights, split


@dataclass(slots=True)
class StepTimes:
    weights: StepWeights
    since_ns: int = 0
    """Until when the time is reported, or when the first request began after a time without any."""

    def begin(self, now_ns: int) -> None:
        """A request begins while no other one runs."""
        self.since_ns = now_ns

    def delivered(self, outputs: Sequence[TokenOutput], ranks: Mapping[str, int], now_ns: int) -> StepTime | None:
        """The time of these outputs; None if no token is among them. `ranks`: by request, of its adapter."""
        weights: dict[str, int] = {}
        for output in outputs:
            is_scored = output.token_id is None and output.error is None and output.completion_tokens == 0
            if output.token_id is None and not (is_scored and output.finish_reason == "length"):
                continue
            rank = ranks.get(output.request_id, 0)
            weight = self.weights.of_decode(output.prompt_tokens + output.completion_tokens, rank)
            if output.completion_tokens <= 1:
                computed = output.prompt_tokens - output.cached_tokens
                weight += self.weights.of_prefill(computed, output.cached_tokens, rank)
            weights[output.request_id] = weights.get(output.request_id, 0) + weight
        if not weights:
            return None
        began_ns, self.since_ns = self.since_ns, now_ns
        shares = zip(weights, split(now_ns - began_ns, list(weights.values())), strict=True)
        return began_ns, now_ns, list(shares)
