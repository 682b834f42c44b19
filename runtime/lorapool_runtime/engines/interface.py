"""The interface between an engine and the rest of the runtime.

Any engine that passes `tests/runtime/engine/test_engine_conformance.py` can serve. Slots are plain integers here: the
caller (`adapters`) decides which adapter is in which slot, and never reuses a slot on which requests run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from lorapool_api.base_modules import BaseModule

BASE_SLOT = -1
"""The slot number of a row that runs on the base alone."""


class EngineStoppedError(RuntimeError):
    """The engine is not running: it was not started, was stopped, or has died."""


class SlotInUseError(RuntimeError):
    """Requests still run on the slot: load or unload it when they have ended."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling parameters of one request, independent of the rest of the batch. Temperature 0 is greedy."""

    max_tokens: int
    """0 computes the prompt and generates nothing."""
    min_tokens: int = 0
    """No token that ends the sequence before so many."""
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
    """None: no log-probabilities; n >= 0: those of the sampled token and of the n likeliest tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence. The last one is counted but delivered with `text_token=False`."""
    ignore_eos: bool = False


class ConstraintError(Exception):
    """The constraint cannot compute the next mask (it exceeded its own limits). Ends its own request only."""


class TokenConstraint(Protocol):
    """The tokens that one sequence may generate next. Belongs to one sequence; only the engine thread uses it.

    Its state advances with the generated tokens, so preemption and recomputation do not affect it.
    """

    def mask(self) -> bytes:
        """One bit per token of the vocabulary, set where the token is allowed next. Token 0 is bit 0 of byte 0.

        Tokens beyond the last bit are not allowed. Raises ConstraintError.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Advances the state by a generated token. Raises ConstraintError."""
        ...

    @property
    def complete(self) -> bool:
        """Whether only the end may follow: the engine then finishes the sequence with STOP."""
        ...


class Grammar(Protocol):
    """A grammar that an answer must follow, compiled within limits before it reaches an engine. Immutable.

    An engine that samples in this process uses `constraint`; one that samples in another process compiles `text` there.
    """

    @property
    def text(self) -> str:
        """A JSON schema, or a grammar in the Lark dialect of llguidance."""
        ...

    @property
    def is_schema(self) -> bool: ...

    def constraint(self, end_ids: frozenset[int] = frozenset()) -> TokenConstraint:
        """A new constraint for one sequence, with its own state. `end_ids` may end it wherever it may end."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    request_id: str
    prompt_ids: tuple[int, ...]
    slot: int
    """Adapter slot, or BASE_SLOT."""
    cache_salt: str
    """Identity of the weights (`base` or the adapter's digest). Requests with different salts share no cached block."""
    sampling: SamplingParams
    cache_scope: str = ""
    """Who shares cached blocks, such as one tenant. Requests with different scopes share none either."""
    prompt_logprobs: int | None = None
    """n >= 0: return the log-probability of each prompt token and of the n likeliest tokens in its place. Such a prompt
    is computed entirely, without the prefix cache."""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token of a request, or its end, or both. Only the last output of a request has a finish_reason."""

    request_id: str
    token_id: int | None
    """None for an end without a token: cancelled, error, or `max_tokens` 0."""
    text_token: bool
    """False for an end-of-sequence token, which is counted but is not part of the text."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the prompt's tokens from the second on. Only in the first output, and only if the request asked for them."""


def ending(
    request: GenerationRequest, generated: int, reason: FinishReason, message: str | None, *, cached: int = 0
) -> TokenOutput:
    """The end of a request without a token."""
    return TokenOutput(
        request_id=request.request_id,
        token_id=None,
        text_token=False,
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=generated,
        cached_tokens=cached,
        finish_reason=reason,
        error=message,
    )


@dataclass(frozen=True, slots=True)
class TargetShape:
    """A linear layer of the base that LoRA may target. `module` is its full dotted name in the model."""

    module: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class DecodeProgramState:
    """Whether decode steps run as one native call or captured graph, or by the model's own code and for what reason."""

    active: bool
    reason: str = ""
    """Empty while active; else `no_kernels`, `untraceable` or `unverified` on a CPU, and `not_captured` or `unverified`
    on a GPU. The log has the details."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about the loaded base that the rest of the runtime needs."""

    max_model_len: int
    vocab_size: int
    dtype: str
    eos_token_ids: frozenset[int]
    targets: tuple[TargetShape, ...]
    """The linear layers inside the model."""
    weight_bytes: int
    decode_program: DecodeProgramState | None = None
    """None for an engine that does not say."""
    modules: tuple[BaseModule, ...] = ()
    """All modules that adapters may name, with all their names."""
    slots_reserved: bool = False
    """Memory for every slot is reserved at the start: a load takes no more of it, and an unload frees none."""
    host_tier: bool = True
    """Whether what `read_adapter` returns holds the weights, so that a later load needs no file. False: the folder has
    to stay until `load` has ended."""
    device: str = ""
    """The accelerator as its driver names it, or `cpu`."""
    slot_bytes: int = 0
    """Bytes of the device that all slots together occupy when each holds an adapter of the highest rank."""
    exact_seeds: bool = True
    """Whether a seed gives the same tokens whatever else is in the batch. False: only as nearly as rounding permits."""


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    slot: int
    device_bytes: int
    """Bytes that the adapter occupies on the device, measured rather than computed."""
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
    """False when the engine thread has died; the process should then exit."""
    device_bytes: int
    prefix_queried_tokens: int = 0
    """Prompt tokens looked up in the prefix cache since the start."""
    prefix_hit_tokens: int = 0
    """Prompt tokens found in the prefix cache since the start."""
    preemptions: int = 0
    """Sequences preempted since the start because no KV block was free."""


class HostAdapter(Protocol):
    """An immutable adapter in host memory, validated and packed for a slot. A slot on a CPU may share its memory."""

    @property
    def rank(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def target_modules(self) -> tuple[str, ...]: ...


TokenSink = Callable[[TokenOutput], None]
"""Receives the outputs of a request in the engine thread. Must not block (use loop.call_soon_threadsafe)."""

StepTime = tuple[int, int, Sequence[tuple[str, int]]]
"""When a step began and ended, on the monotonic clock in nanoseconds, and the share of each request in its duration.
The shares add up to it exactly."""

StepSink = Callable[[StepTime], None]
"""Receives the time of each step in the engine thread, before the outputs of the step. Must not block."""


class Engine(Protocol):
    """Thread-safe. Every method but start, stop and read_adapter returns at once. Futures fail with EngineStoppedError
    where the engine does not run."""

    @property
    def facts(self) -> ModelFacts: ...

    def start(self) -> None:
        """Blocks until the base is loaded: call it in a worker thread. Raises where the base cannot be served."""
        ...

    def stop(self, timeout_s: float) -> None:
        """Ends every request with CANCELLED. Blocks for at most `timeout_s`."""
        ...

    def read_adapter(self, folder: str, *, max_rank: int) -> HostAdapter:
        """Reads and validates a folder. Blocks: call it in a worker thread. Raises ArtifactError."""
        ...

    def load(self, slot: int, adapter: HostAdapter) -> Future[LoadOutcome]:
        """Puts an adapter into the slot, visible from the next step on. SlotInUseError while requests run on it."""
        ...

    def unload(self, slot: int) -> Future[int]:
        """Empties the slot between two steps. The result is the number of bytes given back to the device or system,
        0 where `slots_reserved`."""
        ...

    def submit(self, request: GenerationRequest, sink: TokenSink) -> None:
        """Queues a request.

        Raises ValueError when it can never run: too long for the model or the KV cache, an invalid parameter, a slot
        that does not exist, an id that is running already. A request for an empty slot, or with another `cache_salt`
        than the slot's earlier requests, ends with ERROR: it never runs on other weights.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request after the current step at the latest. Its sink gets CANCELLED with the counts so far.

        Unknown ids are ignored.
        """
        ...

    def report_steps(self, sink: StepSink) -> None:
        """Reports the time of every later step to `sink`."""
        ...

    def observe(self) -> EngineStats: ...
