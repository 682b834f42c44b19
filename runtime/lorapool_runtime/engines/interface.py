"""What the server half of the runtime asks of an engine, and nothing more.

`server` and `adapters` call it from the event loop; `engine.TorchEngine` implements it, and another
engine may take its place if it passes `tests/runtime/engine/test_engine_conformance.py`. Slots are plain
integers here: which adapter sits in a slot, and that nobody re-uses a slot in use, is the caller's
(`adapters`) business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

BASE_SLOT = -1
"""The slot number of a row that runs on the base alone."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Per request, independent of who shares the batch. temperature 0 is greedy."""

    max_tokens: int
    """0 computes the prompt and generates nothing."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    """None: no log-probabilities; n >= 0: the sampled token's and the n likeliest."""
    stop_token_ids: frozenset[int] = frozenset()
    """End the sequence; the ending token is counted but delivered with `text_token=False`."""
    ignore_eos: bool = False


class ConstraintError(Exception):
    """The constraint cannot say what may come next (it ran out of its own bounds); ends its own request only."""


class TokenConstraint(Protocol):
    """What one sequence may say next. Made for one request; from `submit` on the engine's thread alone calls it.

    Its state moves with the tokens the sequence has generated, so being pre-empted and recomputed does not touch it.
    """

    def mask(self) -> bytes:
        """One bit per token of the vocabulary, set where it may come next; lowest bit of the first byte is token 0.

        A token beyond the last bit may not come. Raises ConstraintError.
        """
        ...

    def accept(self, token_id: int) -> None:
        """The sequence took this token. Raises ConstraintError."""
        ...

    @property
    def complete(self) -> bool:
        """Nothing but the end may come: the engine ends the sequence with STOP."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    request_id: str
    prompt_ids: tuple[int, ...]
    slot: int
    """Adapter slot, or BASE_SLOT."""
    cache_salt: str
    """Identity of the weights (`base` or the adapter's digest): never two salts on one cached block."""
    sampling: SamplingParams
    prompt_logprobs: int | None = None
    """n >= 0: each prompt token's log-probability after those before it, and the n likeliest. Such a prompt is always
    computed whole: no part of it is taken from a prefix cache."""
    constraint: TokenConstraint | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token of one request, or its end. Exactly one output per request has a finish_reason, the last."""

    request_id: str
    token_id: int | None
    """None for an end without a token (cancelled, error, `max_tokens` 0)."""
    text_token: bool
    """False for an end-of-sequence token, which is counted but not text."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt's, those that another request on the same weights had computed before."""
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the prompt's tokens from the second on, with the first output of a request that asked for them."""


@dataclass(frozen=True, slots=True)
class TargetShape:
    """One linear layer of the base that LoRA may target: `module` is its full dotted name in the model."""

    module: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class DecodeProgramState:
    """Whether decode steps run as one native call, or by the model's own code and for what reason."""

    active: bool
    reason: str = ""
    """Empty while active; else `no_kernels`, `untraceable` or `unverified`. The log has the details."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the server must know of the loaded base."""

    max_model_len: int
    vocab_size: int
    dtype: str
    eos_token_ids: frozenset[int]
    targets: tuple[TargetShape, ...]
    weight_bytes: int
    decode_program: DecodeProgramState | None = None
    """None for an engine that has no such program, as on a GPU."""


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    slot: int
    device_bytes: int
    """Measured, not computed."""
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    slots_total: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    healthy: bool
    """False when the engine thread has died; the process should end."""
    device_bytes: int
    prefix_queried_tokens: int = 0
    """Tokens of prompts looked up in the prefix cache since the start."""
    prefix_hit_tokens: int = 0
    """Of them, those that were not computed again."""
    preemptions: int = 0
    """Sequences sent back to the queue since the start, for want of KV blocks."""


class HostAdapter(Protocol):
    """An adapter read, checked and laid out in host memory, ready for a slot. It never changes any more: a slot
    on CPU may be this very memory, for as long as it holds it."""

    @property
    def rank(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def target_modules(self) -> tuple[str, ...]: ...


TokenSink = Callable[[TokenOutput], None]
"""Called in the engine thread; must not block (use loop.call_soon_threadsafe)."""


class Engine(Protocol):
    """Thread-safe; every method but start, stop and read_adapter returns at once. One thread inside owns torch."""

    @property
    def facts(self) -> ModelFacts: ...

    def start(self) -> None:
        """Returns when the base is loaded (blocking: call it in a worker thread); raises why it cannot be served."""
        ...

    def stop(self, timeout_s: float) -> None:
        """Ends every request with CANCELLED; blocks for at most `timeout_s`."""
        ...

    def read_adapter(self, folder: str, *, max_rank: int) -> HostAdapter:
        """Reads and checks a verified folder (blocking: call it in a worker thread). Raises ArtifactError."""
        ...

    def load(self, slot: int, adapter: HostAdapter) -> Future[LoadOutcome]:
        """Fills the slot; it counts from the next step on. The slot must hold no running request."""
        ...

    def unload(self, slot: int) -> Future[int]:
        """Clears the slot between two steps; the bytes really given back to the device or operating system."""
        ...

    def submit(self, request: GenerationRequest, sink: TokenSink) -> None:
        """Queues a request. Raises ValueError when it can never run: too long for the model or the KV cache, a bad
        parameter, a slot that does not exist, an id that runs already. A request for a slot that holds no adapter, or
        another `cache_salt` than the slot's requests so far, ends with ERROR: it never runs on other weights."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request after at most the step under way; its sink gets CANCELLED with the counts so far.
        Unknown ids are ignored."""
        ...

    def observe(self) -> EngineStats: ...
