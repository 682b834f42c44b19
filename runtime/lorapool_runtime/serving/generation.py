"""One request's sequences in the engine: submitted together, read as deltas, ended and accounted for once.

The engine's thread delivers tokens through one `Mailbox`, with one wake-up of the event loop per step. Tokens become
text here and not where they are read, so a slow reader does not delay the detection of a stop string. Whatever
happens to the reader, `on_end` is called only after the engine has ended every sequence.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from lorapool_api.protocol import Usage
from lorapool_runtime.accounts.live_request import LiveRequest
from lorapool_runtime.accounts.usage import Outcome
from lorapool_runtime.engines.interface import Engine, FinishReason, GenerationRequest, TokenLogprob, TokenOutput
from lorapool_runtime.openai.detokenizer import Decode, TextStream
from lorapool_runtime.openai.encoding import EncodedRequest
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest
from lorapool_runtime.openai.response import Delta
from lorapool_runtime.openai.stops import Stops

T = TypeVar("T")


def engine_requests(
    request: ChatRequest | CompletionRequest,
    encoded: EncodedRequest,
    *,
    slot: int,
    cache_salt: str,
    cache_scope: str,
) -> list[GenerationRequest]:
    """One engine request per sequence, in the order of the response's choices."""
    prefix = uuid.uuid4().hex
    return [
        GenerationRequest(
            f"{prefix}-{number}",
            encoded.prompts[number // request.n],
            slot,
            cache_salt,
            sampling,
            cache_scope,
            prompt_logprobs=request.prompt_logprobs,
            grammar=encoded.grammar,
        )
        for number, sampling in enumerate(encoded.sampling)
    ]


class Mailbox:
    """Carries what the engine's thread reports to the event loop, many per wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._outputs: deque[Callable[[], None]] = deque()
        self._woken = False

    def sink(self, receive: Callable[[T], None], first: Callable[[T], None] | None = None) -> Callable[[T], None]:
        """A sink for the engine that passes its outputs to `receive` on the event loop, in order.

        `first` is called before, in the engine's thread.
        """

        def put(output: T) -> None:
            if first is not None:
                first(output)
            self._outputs.append(partial(receive, output))
            if not self._woken:
                self._woken = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: the process is ending and no request is open
                    self._woken = False

        return put

    def _deliver(self) -> None:
        self._woken = False  # before emptying: an output appended after the last pop schedules another delivery
        while self._outputs:
            self._outputs.popleft()()


@dataclass(slots=True)
class _SequenceState:
    request_id: str
    stream: TextStream
    completion_tokens: int = 0
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)
    pending_offsets: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finished: bool = False
    """Its last delta has been emitted: later outputs of the engine are neither text nor counted."""
    ended: bool = False
    """The engine has ended it."""


class Generation:
    """`prompts` x `n` sequences of one request. Sequence number = prompt number * n + choice."""

    def __init__(
        self,
        engine: Engine,
        mailbox: Mailbox,
        requests: Sequence[GenerationRequest],
        *,
        n: int,
        live: LiveRequest,
        stops: Stops,
        decode: Decode,
        on_token: Callable[[int], None],
        on_end: Callable[[Outcome, Usage], None],
        score_end_token: bool = False,
        report_steps: bool = False,
    ) -> None:
        """`live` counts what the engine computes. `on_token` is called with the number of new tokens, `on_end` once.

        `score_end_token`: reports the log-probability of an end-of-sequence token too, though it is not text.
        `report_steps`: a token that completes no text has a delta too, with the usage alone.
        """
        self._engine = engine
        self._mailbox = mailbox
        self._n = n
        self._live = live
        self._on_token = on_token
        self._on_end: Callable[[Outcome, Usage], None] | None = on_end
        self._score_end_token = score_end_token
        self._report_steps = report_steps
        self._requests = requests
        self._stop_is_text = stops.included
        self._sequences = [
            _SequenceState(request.request_id, TextStream(decode, stops.texts, included=stops.included))
            for request in requests
        ]
        self._numbers = {request.request_id: number for number, request in enumerate(requests)}
        self._prompt_tokens = [0] * (len(requests) // n)
        self._cached_tokens = [0] * (len(requests) // n)
        self._open = 0
        self._outcome = Outcome.COMPLETED
        self._left = False
        self._deltas: deque[Delta] = deque()
        self._reader: asyncio.Future[None] | None = None
        self.ended = asyncio.Event()
        """Set when the engine has ended every sequence: `usage` is then final."""

    def start(self) -> None:
        """Submits all sequences. Raises what `Engine.submit` raises: ValueError for a request that can never run."""
        try:
            for number, request in enumerate(self._requests):
                self._engine.submit(request, self._mailbox.sink(self._receive, partial(self._computed, number)))
                self._open += 1
        except Exception:
            self._outcome = Outcome.REFUSED
            self._end_all()
            if self._open == 0:
                self._finish()
            raise

    async def next(self) -> Delta:
        """The next delta of any sequence. Only one caller may wait at a time."""
        while not self._deltas:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._deltas.popleft()

    async def next_all(self) -> list[Delta]:
        """The deltas since the last call, at least one. Only one caller may wait at a time."""
        found = [await self.next(), *self._deltas]
        self._deltas.clear()
        return found

    def cancel(self) -> None:
        """Ends the running sequences, because the reader left. Does nothing after the end."""
        self._left = True
        if not self._all_finished and self._outcome is Outcome.COMPLETED:
            self._outcome = Outcome.CANCELLED
        self._end_all()

    def abort(self, message: str) -> None:
        """Ends the running sequences; the reader gets the error `message`."""
        if self._all_finished:
            return
        self._outcome = Outcome.FAILED
        for number, sequence in enumerate(self._sequences):
            if not sequence.finished:
                self._emit(number, "", FinishReason.ERROR, message)
        self._end_all()

    def engine_died(self, message: str) -> None:
        """Aborts without waiting for the engine, from which no further output can be expected."""
        self.abort(message)
        if self._open:
            self._open = 0
            self._finish()

    def usage(self) -> Usage:
        """Cumulative tokens so far. A prompt counts once, however many choices it has."""
        return Usage(
            prompt_tokens=sum(self._prompt_tokens),
            completion_tokens=sum(sequence.completion_tokens for sequence in self._sequences),
            cached_tokens=sum(self._cached_tokens),
        )

    @property
    def _all_finished(self) -> bool:
        """True when every last delta has been emitted; the engine may still compute (a stop string was found)."""
        return all(sequence.finished for sequence in self._sequences)

    # --- on the event loop, from the mailbox ---------------------------------------------

    def _receive(self, output: TokenOutput) -> None:
        number = self._numbers[output.request_id]
        sequence = self._sequences[number]
        if sequence.ended or self._on_end is None:
            return
        self._count(number, output)
        if not sequence.finished:
            self._detokenize(number, output)
        if output.finish_reason is not None:
            sequence.ended = True
            self._open -= 1
            if output.finish_reason is FinishReason.ERROR:
                self._outcome = Outcome.FAILED
            if self._open == 0:
                self._finish()

    def _detokenize(self, number: int, output: TokenOutput) -> None:
        sequence = self._sequences[number]
        if output.logprob is not None and (output.text_token or self._score_end_token):
            sequence.pending_logprobs.append(output.logprob)
            sequence.pending_offsets.append(sequence.stream.characters)
        sequence.prompt_logprobs = output.prompt_logprobs or sequence.prompt_logprobs
        text, stopped = "", False
        if output.token_id is not None and (output.text_token or self._stop_is_text):
            text, stopped = sequence.stream.push(output.token_id)
        finish, error = output.finish_reason, output.error
        if finish is FinishReason.CANCELLED:
            finish, error = FinishReason.ERROR, "The sequence was ended by the runtime."
        if finish in (FinishReason.STOP, FinishReason.LENGTH) and not stopped:
            rest, stopped = sequence.stream.finish()
            text += rest
        if stopped:
            finish, error = FinishReason.STOP, None
            if output.finish_reason is None:
                self._engine.cancel(sequence.request_id)
        if text or finish is not None:
            self._emit(number, text, finish, error)
        elif self._report_steps and not self._left:
            self._pass_on(Delta(number, "", (), self.usage()))

    def _emit(self, number: int, text: str, finish: FinishReason | None, error: str | None) -> None:
        sequence = self._sequences[number]
        if finish is not None:
            sequence.finished = True
        if self._left:
            return
        delta = Delta(
            number,
            text,
            tuple(sequence.pending_logprobs),
            self.usage(),
            finish,
            error,
            tuple(sequence.pending_offsets),
            sequence.prompt_logprobs,
            sequence.completion_tokens,
        )
        sequence.pending_logprobs.clear()
        sequence.pending_offsets.clear()
        sequence.prompt_logprobs = ()
        self._pass_on(delta)

    def _pass_on(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _count(self, number: int, output: TokenOutput) -> None:
        """Counts a sequence up to its stop string, though the engine may be a token ahead."""
        sequence = self._sequences[number]
        self._on_token(int(output.token_id is not None))
        prompt = number // self._n
        self._prompt_tokens[prompt] = max(self._prompt_tokens[prompt], output.prompt_tokens)
        self._cached_tokens[prompt] = max(self._cached_tokens[prompt], output.cached_tokens)
        if not sequence.finished or self._outcome is not Outcome.COMPLETED:
            sequence.completion_tokens = max(sequence.completion_tokens, output.completion_tokens)

    def _computed(self, number: int, output: TokenOutput) -> None:
        """In the engine's thread."""
        self._live.count(number, output.prompt_tokens, output.cached_tokens, output.completion_tokens)

    def _end_all(self) -> None:
        for sequence in self._sequences:
            if not sequence.ended:
                self._engine.cancel(sequence.request_id)

    def _finish(self) -> None:
        on_end, self._on_end = self._on_end, None
        self.ended.set()
        if on_end is not None:
            on_end(self._outcome, self.usage())
