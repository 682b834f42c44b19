"""What an attempt came to, from its two halves, and what of it is billed. Pure.

The runtime's half has the exact counts of what was computed; the gateway's half says what reached the client. Either
half may be missing: a gateway's pod or a runtime's pod may be lost with its journal. Nothing is estimated: where no
half has counts, they are unknown and reported as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lorapool_api.usage_protocol import AttemptEnd, Ended


class Billed(StrEnum):
    """How an attempt ended, as it is billed and reported."""

    COMPLETED = "completed"
    """The whole answer was delivered. Billed."""
    CLIENT_LEFT = "client_left"
    """The client ended it. What was computed is billed."""
    FAILED = "failed"
    """The platform failed. Not billed; its tokens are waste."""
    LOST = "lost"
    """The runtime or the connection to it was lost. Not billed; its tokens are waste."""
    WITHHELD = "withheld"
    """The answer was of other weights and was not delivered. Not billed; its tokens are waste."""
    REFUSED = "refused"
    """The runtime did not admit it. Nothing was computed."""
    UNKNOWN = "unknown"
    """Neither half says how it ended. Not billed."""


BILLED = frozenset({Billed.COMPLETED, Billed.CLIENT_LEFT})
"""Outcomes whose tokens the tenant pays."""


class CountSource(StrEnum):
    """Which half the counts of an attempt are from."""

    RUNTIME = "runtime"
    """Exact: every token that was computed."""
    GATEWAY = "gateway"
    """What the runtime last reported to the gateway before it was lost: at least what was delivered."""
    NONE = "none"
    """Nothing was computed, which is proven."""
    UNKNOWN = "unknown"
    """No half has counts."""


@dataclass(frozen=True, slots=True)
class RuntimeHalf:
    """Of `RequestRecord`, or of a remainder of several requests."""

    outcome: Ended
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    gpu_ns: int = 0


@dataclass(frozen=True, slots=True)
class GatewayHalf:
    """Of `ClosedRecord`."""

    outcome: AttemptEnd
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What an attempt came to. All counts are tokens."""

    outcome: Billed
    source: CountSource
    prompt_tokens: int = 0
    """Cached ones included."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    gpu_ns: int = 0
    delivered_tokens: int = 0
    """Generated tokens that the gateway knows to have been reported; 0 without its half."""

    @property
    def billed_prompt_tokens(self) -> int:
        """Prompt tokens at the full price: without the cached ones."""
        return self.prompt_tokens - self.cached_tokens if self.outcome in BILLED else 0

    @property
    def billed_cached_tokens(self) -> int:
        return self.cached_tokens if self.outcome in BILLED else 0

    @property
    def billed_completion_tokens(self) -> int:
        return self.completion_tokens if self.outcome in BILLED else 0


_OF_GATEWAY = {
    AttemptEnd.COMPLETED: Billed.COMPLETED,
    AttemptEnd.CLIENT_LEFT: Billed.CLIENT_LEFT,
    AttemptEnd.FAILED: Billed.FAILED,
    AttemptEnd.TIMEOUT: Billed.FAILED,
    AttemptEnd.LOST: Billed.LOST,
    AttemptEnd.REFUSED: Billed.REFUSED,
    AttemptEnd.WITHHELD: Billed.WITHHELD,
}
_OF_RUNTIME = {
    Ended.COMPLETED: Billed.COMPLETED,
    Ended.CANCELLED: Billed.CLIENT_LEFT,
    Ended.FAILED: Billed.FAILED,
    Ended.LOST: Billed.LOST,
}


def final_outcome(runtime: Ended | None, gateway: AttemptEnd | None) -> Billed:
    """How an attempt ended for its client. The gateway's half decides where it is there: it spoke to the client.

    Without a gateway's half, a cancelled request is the client's: it left, or it left with its gateway.
    """
    if gateway is not None:
        if gateway is AttemptEnd.REFUSED and runtime is not None:
            return _OF_RUNTIME[runtime]  # it was admitted after all
        return _OF_GATEWAY[gateway]
    return Billed.UNKNOWN if runtime is None else _OF_RUNTIME[runtime]


def result_of(runtime: RuntimeHalf | None, gateway: GatewayHalf | None, *, runtime_gone: bool = False) -> Result:
    """Joins the halves of one attempt, or the sums of halves with the same outcomes.

    `runtime_gone`: the runtime is gone with records that were not read. Only then does the lack of its half leave open
    what was computed: a runtime has a record of every request that it admitted.
    """
    outcome = final_outcome(runtime.outcome if runtime else None, gateway.outcome if gateway else None)
    delivered = (gateway.completion_tokens or 0) if gateway is not None else 0
    if runtime is not None:
        return Result(
            outcome,
            CountSource.RUNTIME,
            runtime.prompt_tokens,
            runtime.cached_tokens,
            runtime.completion_tokens,
            runtime.gpu_ns,
            delivered,
        )
    if gateway is not None and not (gateway.completion_tokens is None and gateway.prompt_tokens is None):
        prompt = gateway.prompt_tokens or 0
        return Result(
            outcome, CountSource.GATEWAY, prompt, min(gateway.cached_tokens or 0, prompt), delivered, 0, delivered
        )
    if runtime_gone and (gateway is None or gateway.outcome is not AttemptEnd.REFUSED):
        return Result(Billed.UNKNOWN, CountSource.UNKNOWN)
    return Result(outcome, CountSource.NONE)
