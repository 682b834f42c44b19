"""One request's sequences on their way through the engine, and what they cost in the end.

`server` starts a `Generation` and reads its `Delta`s; the engine's thread delivers tokens through one `Mailbox` with
one wake-up per step, and they become text here, so that a slow reader delays no stop string. Whatever happens to the
reader, the slot is given back only after the engine has ended every sequence; then tokens are counted, once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from lorapool_api.protocol import Usage
from lorapool_runtime.engines.interface import Engine, FinishReason, GenerationRequest, TokenLogprob, TokenOutput
from lorapool_runtime.openai.detokenizer import Decode, Piece, TextStream


class Outcome(StrEnum):
    """How a request ended, as counted."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    """The engine did not take it: nothing ran, nothing is counted."""


class Mailbox:
    """Carries outputs from the engine's thread to the event loop, many per wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._outputs: deque[tuple[Callable[[TokenOutput], None], TokenOutput]] = deque()
        self._woken = False

    def sink(self, receive: Callable[[TokenOutput], None]) -> Callable[[TokenOutput], None]:
        """A sink for the engine that hands its outputs to `receive` on the event loop, in order."""

        def put(output: TokenOutput) -> None:
            self._outputs.append((receive, output))
            if not self._woken:
                self._woken = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: the process is ending and nobody listens
                    self._woken = False

        return put

    def _deliver(self) -> None:
        self._woken = False  # before emptying: whoever appends after the last pop wakes again
        while self._outputs:
            receive, output = self._outputs.popleft()
            receive(output)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sequence has to say next: text, and for the last of it why it ended."""

    number: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    """Of the whole request, up to this text."""
    finish: FinishReason | None = None
    error: str | None = None
    offsets: tuple[int, ...] = ()
    """Where in the sequence's text the token of each log-probability begins."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on, with the first delta of a sequence that asked for them."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a request came to, handed to `on_end` exactly once."""

    outcome: Outcome
    usage: Usage


@dataclass(slots=True)
class _Sequence:
    request: GenerationRequest
    stream: TextStream
    completion_tokens: int = 0
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)
    pending_offsets: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    told: bool = False
    """The reader has its end (or gave up): later outputs of the engine are neither text nor counted."""
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
        stops: Sequence[str],
        decode: Decode,
        on_end: Callable[[Ended], None],
        tell_end_token: bool = False,
    ) -> None:
        """`tell_end_token`: the log-probability of an end-of-sequence token is told too, though it is no text."""
        self._engine = engine
        self._mailbox = mailbox
        self._n = n
        self._on_end = on_end
        self._tell_end_token = tell_end_token
        self._sequences = [_Sequence(request, TextStream(decode, stops)) for request in requests]
        self._numbers = {request.request_id: number for number, request in enumerate(requests)}
        self._prompt_tokens = [0] * (len(requests) // n)
        self._cached_tokens = [0] * (len(requests) // n)
        self._open = 0
        self._outcome = Outcome.COMPLETED
        self._left = False
        self._deltas: deque[Delta] = deque()
        self._reader: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Submits all sequences. Raises what the engine raises, for instance for a prompt that can never fit."""
        try:
            for sequence in self._sequences:
                self._engine.submit(sequence.request, self._mailbox.sink(self._receive))
                self._open += 1
        except Exception:
            self._outcome = Outcome.REFUSED
            self._end_all()
            if self._open == 0:
                self._finish()
            raise

    async def next(self) -> Delta:
        """The next piece of any sequence; there is one reader."""
        while not self._deltas:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._deltas.popleft()

    def cancel(self) -> None:
        """The reader left: end what still runs. Harmless after the end."""
        self._left = True
        if not self._all_told and self._outcome is Outcome.COMPLETED:
            self._outcome = Outcome.CANCELLED
        self._end_all()

    def abort(self, message: str) -> None:
        """We have to end it (draining, the adapter is gone, the engine died): the reader gets `message` as an error."""
        if self._all_told:
            return
        self._outcome = Outcome.FAILED
        for number, sequence in enumerate(self._sequences):
            if not sequence.told:
                self._tell(number, "", FinishReason.ERROR, message)
        self._end_all()

    def engine_died(self, message: str) -> None:
        """As `abort`, when no further output of the engine can be expected."""
        self.abort(message)
        if self._open:
            self._open = 0
            self._finish()

    def usage(self) -> Usage:
        """Cumulative tokens so far; a prompt counts once, however many choices were asked of it."""
        return Usage(
            prompt_tokens=sum(self._prompt_tokens),
            completion_tokens=sum(sequence.completion_tokens for sequence in self._sequences),
            cached_tokens=sum(self._cached_tokens),
        )

    @property
    def _all_told(self) -> bool:
        """The reader has every end, though the engine may still owe us the last one (a stop string was found)."""
        return all(sequence.told for sequence in self._sequences)

    # --- on the event loop, called by the mailbox ----------------------------------------

    def _receive(self, output: TokenOutput) -> None:
        number = self._numbers[output.request_id]
        sequence = self._sequences[number]
        if sequence.ended:
            return
        self._count(number, output)
        if not sequence.told:
            self._speak(number, output)
        if output.finish_reason is not None:
            sequence.ended = True
            self._open -= 1
            if output.finish_reason is FinishReason.ERROR:
                self._outcome = Outcome.FAILED
            if self._open == 0:
                self._finish()

    def _speak(self, number: int, output: TokenOutput) -> None:
        sequence = self._sequences[number]
        if output.logprob is not None and (output.text_token or self._tell_end_token):
            sequence.pending_logprobs.append(output.logprob)
            sequence.pending_offsets.append(sequence.stream.characters)
        sequence.prompt_logprobs = output.prompt_logprobs or sequence.prompt_logprobs
        piece = Piece("")
        if output.token_id is not None and output.text_token:
            piece = sequence.stream.push(output.token_id)
        finish, error = output.finish_reason, output.error
        if finish is FinishReason.CANCELLED:
            finish, error = FinishReason.ERROR, "The sequence was ended by the runtime."
        if finish in (FinishReason.STOP, FinishReason.LENGTH) and not piece.stopped:
            rest = sequence.stream.finish()
            piece = Piece(piece.text + rest.text, rest.stopped)
        if piece.stopped:
            finish, error = FinishReason.STOP, None
            if output.finish_reason is None:
                self._engine.cancel(sequence.request.request_id)
        if piece.text or finish is not None:
            self._tell(number, piece.text, finish, error)

    def _tell(self, number: int, text: str, finish: FinishReason | None, error: str | None) -> None:
        sequence = self._sequences[number]
        if finish is not None:
            sequence.told = True
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
        )
        sequence.pending_logprobs.clear()
        sequence.pending_offsets.clear()
        sequence.prompt_logprobs = ()
        self._deltas.append(delta)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _count(self, number: int, output: TokenOutput) -> None:
        """A sequence whose stop string was found counts up to there, though the engine may be a token ahead."""
        sequence = self._sequences[number]
        prompt = number // self._n
        self._prompt_tokens[prompt] = max(self._prompt_tokens[prompt], output.prompt_tokens)
        self._cached_tokens[prompt] = max(self._cached_tokens[prompt], output.cached_tokens)
        if not sequence.told or self._outcome is not Outcome.COMPLETED:
            sequence.completion_tokens = max(sequence.completion_tokens, output.completion_tokens)

    def _end_all(self) -> None:
        for sequence in self._sequences:
            if not sequence.ended:
                self._engine.cancel(sequence.request.request_id)

    def _finish(self) -> None:
        on_end, self._on_end = self._on_end, _already
        on_end(Ended(self._outcome, self.usage()))


def _already(_ended: Ended) -> None:
    """`on_end` has been called."""
