"""One request inside the engine: its tokens, how many of them are computed, and its status.

No other module changes the status, and an illegal transition raises. No torch, no clock, no I/O.

    WAITING --admit--> RUNNING --finish--> FINISHED
       ^                  |                   ^
       +-----preempt------+      finish ------+ (also from WAITING, when cancelled)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from lorapool_runtime.engines.interface import BASE_SLOT, FinishReason, GenerationRequest, TokenConstraint, TokenLogprob
from lorapool_runtime.engines.torch.scheduling.prefix import next_key, root_key


class SequenceStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class IllegalMoveError(RuntimeError):
    """A transition that the status of the sequence does not allow: a fault of the caller, never of a client."""


class Sequence:
    """`tokens` is prompt plus generated; the first `computed` of them have their keys and values in `block_table`."""

    __slots__ = (
        "_keys",
        "arrival",
        "block_table",
        "cached_tokens",
        "computed",
        "constraint",
        "finish_reason",
        "preemptions",
        "prompt_logprobs",
        "prompt_tokens",
        "request",
        "seed",
        "status",
        "tokens",
    )

    def __init__(
        self, request: GenerationRequest, *, arrival: int, seed: int, constraint: TokenConstraint | None = None
    ) -> None:
        self.request = request
        self.constraint = constraint
        self.arrival = arrival
        self.seed = seed
        self.tokens = list(request.prompt_ids)
        self.prompt_tokens = len(request.prompt_ids)
        self.prompt_logprobs: list[TokenLogprob] = []
        self.computed = 0
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache at the first admission, not at later ones after a preemption."""
        self.preemptions = 0
        self.block_table: list[int] = []
        self._keys: list[bytes] = []
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def slot(self) -> int:
        return self.request.slot

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed yet: 1 for a decode, more for a prefill."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt were requested and are not reported yet."""
        return self.request.prompt_logprobs is not None and not self.generated

    def score(self, start: int, logprobs: Iterable[TokenLogprob]) -> None:
        """Stores log-probabilities of the prompt tokens after position `start`. A recomputed chunk replaces them."""
        del self.prompt_logprobs[start:]
        self.prompt_logprobs += logprobs

    @property
    def fault(self) -> str | None:
        """Why its results must not be reported, None where they may be."""
        if self.scores_prompt and not all(math.isfinite(one.logprob) for one in self.prompt_logprobs):
            return "the model's output is not finite"
        return None

    @property
    def reads_cache(self) -> bool:
        """Whether it may use cached blocks. A request for prompt log-probabilities must compute the whole prompt."""
        return not self.scores_prompt

    def block_key(self, index: int, block_size: int) -> bytes:
        """The prefix cache key of its full block `index`. Raises IllegalMoveError for a block that is not full."""
        while len(self._keys) <= index:
            begin = len(self._keys) * block_size
            if begin + block_size > len(self.tokens):
                raise IllegalMoveError(f"{self.request_id} has no full block {index}")
            parent = self._keys[-1] if self._keys else self._root_key()
            self._keys.append(next_key(parent, self.tokens[begin : begin + block_size]))
        return self._keys[index]

    def _root_key(self) -> bytes:
        request = self.request
        return root_key(request.cache_salt, request.cache_scope, is_base=self.slot == BASE_SLOT)

    def admit(self, block_table: list[int], *, cached_tokens: int = 0) -> None:
        """WAITING to RUNNING. Its first `cached_tokens` are in the blocks already; at least one token must be left."""
        self._must_be(SequenceStatus.WAITING, "admit")
        if not 0 <= cached_tokens < len(self.tokens):
            raise IllegalMoveError(f"{self.request_id} cannot take {cached_tokens} of {len(self.tokens)} tokens")
        self.block_table = block_table
        self.computed = cached_tokens
        if not self.preemptions:
            self.cached_tokens = cached_tokens
        self.status = SequenceStatus.RUNNING

    def preempt(self) -> list[int]:
        """RUNNING to WAITING. Everything is recomputed later. Returns the blocks it held."""
        self._must_be(SequenceStatus.RUNNING, "preempt")
        self.status = SequenceStatus.WAITING
        self.preemptions += 1
        return self._give_back()

    def finish(self, reason: FinishReason) -> list[int]:
        """WAITING or RUNNING to FINISHED. Returns the blocks it held."""
        if self.status is SequenceStatus.FINISHED:
            raise IllegalMoveError(f"{self.request_id} is finished already ({self.finish_reason})")
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        return self._give_back()

    def advance(self, num_tokens: int) -> None:
        """Records that `num_tokens` more tokens have been computed."""
        self._must_be(SequenceStatus.RUNNING, "advance")
        if not 0 < num_tokens <= self.pending:
            raise IllegalMoveError(f"{self.request_id} cannot advance by {num_tokens}: {self.pending} pending")
        self.computed += num_tokens

    def append(self, token_id: int) -> None:
        """Adds one sampled token. All tokens before it must be computed."""
        self._must_be(SequenceStatus.RUNNING, "append to")
        if self.pending:
            raise IllegalMoveError(f"{self.request_id} cannot take a token: {self.pending} pending")
        self.tokens.append(token_id)

    def _give_back(self) -> list[int]:
        blocks, self.block_table, self.computed = self.block_table, [], 0
        return blocks

    def _must_be(self, status: SequenceStatus, move: str) -> None:
        if self.status is not status:
            raise IllegalMoveError(f"cannot {move} {self.request_id}: it is {self.status}")
