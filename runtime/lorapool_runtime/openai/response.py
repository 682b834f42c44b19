"""OpenAI response bodies and stream chunks, built from deltas.

One `ResponseBuilder` per request gives the whole body, or one chunk after another. Pure: it knows neither sockets nor
the engine.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorapool_api.protocol import Usage
from lorapool_runtime.engines.interface import FinishReason, TokenLogprob
from lorapool_runtime.openai.detokenizer import EchoedPrompt
from lorapool_runtime.openai.reasoning import ReasoningReader, ReasoningStart
from lorapool_runtime.openai.tools.tool_calls import ToolCallDelta, ToolCallReader
from lorapool_runtime.openai.tools.tool_format import ToolFormat

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
TokenText = Callable[[int], str]
TokenBytes = Callable[[int], list[int]]
DONE_EVENT = b"data: [DONE]\n\n"
_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Delta:
    """The next output of one sequence: new text, and with the last one why the sequence ended."""

    number: int
    """The sequence's number: the index of its choice in the response."""
    text: str
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    """Of the whole request, up to this text."""
    finish: FinishReason | None = None
    error: str | None = None
    offsets: tuple[int, ...] = ()
    """For each log-probability, the offset in the sequence's text at which its token begins."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on, with the first delta of a sequence that asked for them."""
    tokens: int = 0
    """Generated tokens of the sequence up to this text."""

    @property
    def is_output(self) -> bool:
        """False for a delta that only reports the usage."""
        return bool(self.text) or self.finish is not None


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The fields that every chunk of one response repeats."""

    chat: bool
    model: str
    created_unix_s: int
    fingerprint: str
    include_usage: bool = False
    continuous_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])

    def body(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + self.id,
            "object": kind,
            "created": self.created_unix_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }


@dataclass(slots=True)
class _Call:
    name: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")
    arguments: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class _Choice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    begun: bool = False
    reader: ToolCallReader | None = None
    calls: list[_Call] = field(default_factory=list)
    reasoner: ReasoningReader | None = None
    reasoning: str = ""

    def apart(self, delta: Delta) -> tuple[str, Delta]:
        """The delta's reasoning, and the delta without it."""
        if self.reasoner is None:
            return "", delta
        reasoning, content = self.reasoner.push(delta.text, delta.tokens)
        if delta.finish is not None:
            rest = self.reasoner.finish()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
        self.reasoning += reasoning
        return reasoning, replace(delta, text=content)

    def read(self, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        """The delta's text, and its parts of tool calls as a stream has them."""
        if self.reader is None:
            return delta.text, []
        parts = self.reader.push(delta.text)
        if delta.finish is not None:
            parts += self.reader.finish()
        text = "".join(part for part in parts if isinstance(part, str))
        return text, self._take_calls([part for part in parts if isinstance(part, ToolCallDelta)])

    def _take_calls(self, parts: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
        """Adds the parts to the calls; returns one streamed part for each call."""
        streamed: dict[int, dict[str, Any]] = {}
        for part in parts:
            if part.name is not None:
                self.calls.append(_Call(part.name))
                streamed[part.index] = {"index": part.index, **self.calls[-1].body()}
            self.calls[part.index].arguments.append(part.arguments)
            own = streamed.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
            own["function"]["arguments"] += part.arguments
        return list(streamed.values())

    def finish_reason(self, finish: FinishReason) -> str:
        return "tool_calls" if self.calls and finish is FinishReason.STOP else _FINISH[finish]


class ResponseBuilder:
    """One response in progress: `add` collects a delta for the whole `body`, `chunks` encodes a delta for a stream."""

    def __init__(
        self,
        head: ResponseHead,
        *,
        choices: int,
        top_logprobs: int | None,
        echo: Sequence[EchoedPrompt],
        tools: ToolFormat | None = None,
        reasoning: ReasoningStart = ReasoningStart.NONE,
        token_text: TokenText,
        token_bytes: TokenBytes,
    ) -> None:
        self._head = head
        self._top_logprobs = top_logprobs
        self._token_text = token_text
        self._token_bytes = token_bytes
        self._echo = echo
        self._chunk_start: bytes | None = None
        self._choices = [
            _Choice(
                reader=None if tools is None else ToolCallReader(tools),
                reasoner=None if reasoning is ReasoningStart.NONE else ReasoningReader(reasoning),
            )
            for _ in range(choices)
        ]

    # --- whole --------------------------------------------------------------------------

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.number]
        _, delta = choice.apart(delta)
        choice.text += choice.read(delta)[0]
        choice.logprobs.extend(delta.logprobs)
        choice.offsets.extend(delta.offsets)
        choice.prompt_logprobs = delta.prompt_logprobs or choice.prompt_logprobs
        if delta.finish is not None:
            choice.finish = choice.finish_reason(delta.finish)

    def body(self, usage: Usage) -> dict[str, Any]:
        kind = "chat.completion" if self._head.chat else "text_completion"
        choices = [self._choice_body(number, choice) for number, choice in enumerate(self._choices)]
        return {**self._head.body(kind, choices), "usage": self._usage_body(usage)}

    def _choice_body(self, number: int, choice: _Choice) -> dict[str, Any]:
        if self._head.chat:
            logprobs = self._chat_logprobs(choice.logprobs)
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": [call.body() for call in choice.calls]}
            return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}
        echo = self._echo_of(number)
        text = (echo.text if echo else "") + choice.text
        logprobs = self._completion_logprobs(
            choice.logprobs, choice.offsets, echo, choice.prompt_logprobs, with_prompt=True
        )
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}

    # --- streamed -----------------------------------------------------------------------

    def chunks(self, delta: Delta) -> list[bytes]:
        """The data events of one delta: the role first, then text, then the end."""
        choice = self._choices[delta.number]
        parts: list[tuple[dict[str, Any], Any, str | None]] = []  # (delta or text, logprobs, finish_reason)
        reasoning, delta = choice.apart(delta)
        text, calls = choice.read(delta)
        finish = None if delta.finish is None else choice.finish_reason(delta.finish)
        if self._head.chat:
            logprobs = self._chat_logprobs(delta.logprobs)
            if not choice.begun:
                parts.append(({"delta": {"role": "assistant", "content": ""}}, None, None))
            if reasoning:
                parts.append(({"delta": {"reasoning_content": reasoning}}, None, None))
            if text or logprobs:
                parts.append(({"delta": {"content": text}}, logprobs, None))
            if calls:
                parts.append(({"delta": {"tool_calls": calls}}, None, None))
            if finish is not None:
                parts.append(({"delta": {}}, None, finish))
        else:
            echo = self._echo_of(delta.number)
            first = not choice.begun
            text = (echo.text if echo and first else "") + text
            logprobs = self._completion_logprobs(
                delta.logprobs, delta.offsets, echo, delta.prompt_logprobs, with_prompt=first
            )
            parts.append(({"text": text}, logprobs, finish))
        choice.begun = True
        usage = delta.usage if self._head.continuous_usage else None
        return [
            self._event([{"index": delta.number, **part, "logprobs": own_logprobs, "finish_reason": end}], usage)
            for part, own_logprobs, end in parts
        ]

    def closing(self, usage: Usage) -> list[bytes]:
        """The events after the last delta: with `stream_options.include_usage` the usage, then the end."""
        return [self._event([], usage), DONE_EVENT] if self._head.include_usage else [DONE_EVENT]

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
        if self._chunk_start is None:  # encoded once: every chunk begins with the same fields
            kind = "chat.completion.chunk" if self._head.chat else "text_completion"
            self._chunk_start = b"data: " + compact_json(self._head.body(kind, []))[: -len(b"[]}")]
        end = b"}\n\n"
        if self._head.include_usage:
            end = b',"usage":' + compact_json(None if usage is None else self._usage_body(usage)) + end
        return self._chunk_start + compact_json(choices) + end

    # --- parts --------------------------------------------------------------------------

    def _usage_body(self, usage: Usage) -> dict[str, Any]:
        reasoners = [choice.reasoner for choice in self._choices if choice.reasoner is not None]
        return usage_body(usage, sum(reasoner.tokens for reasoner in reasoners))

    def _echo_of(self, number: int) -> EchoedPrompt | None:
        return self._echo[number * len(self._echo) // len(self._choices)] if self._echo else None

    def _chat_logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._top_logprobs is None or not entries:
            return None
        return {"content": chat_logprobs(entries, self._token_text, self._token_bytes), "refusal": None}

    def _completion_logprobs(
        self,
        entries: Sequence[TokenLogprob],
        offsets: Sequence[int],
        echo: EchoedPrompt | None,
        of_prompt: Sequence[TokenLogprob],
        *,
        with_prompt: bool,
    ) -> dict[str, Any] | None:
        """The `logprobs` object of these tokens; `with_prompt` puts the echoed prompt's tokens before them.

        The first token of a prompt has no log-probability: null.
        """
        if self._top_logprobs is None:
            return None
        begin = len(echo.text) if echo else 0
        prompt = echo if with_prompt else None
        unscored = prompt.token_ids[:1] if prompt else ()
        scored = [*(of_prompt if prompt else ()), *entries]
        top: list[dict[str, float] | None] = [None for _ in unscored]
        top += [self._likeliest(entry) for entry in scored]
        return {
            "tokens": [self._token_text(token_id) for token_id in (*unscored, *(entry.token_id for entry in scored))],
            "token_logprobs": [*(None for _ in unscored), *(_finite(entry.logprob) for entry in scored)],
            "top_logprobs": top if self._top_logprobs else None,
            "text_offset": [*(prompt.offsets if prompt else ()), *(begin + offset for offset in offsets)],
        }

    def _likeliest(self, entry: TokenLogprob) -> dict[str, float]:
        """Text → log-probability, most likely first. Like OpenAI, adds the token itself if it is not among them."""
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(self._token_text(token_id), _finite(logprob))
        return found


def chat_logprobs(
    entries: Sequence[TokenLogprob], token_text: TokenText, token_bytes: TokenBytes
) -> list[dict[str, Any]]:
    """The log-probabilities of a chat's tokens, each with those of the likeliest ones."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": token_text(token_id), "logprob": _finite(logprob), "bytes": token_bytes(token_id)}

    return [
        {**token(entry.token_id, entry.logprob), "top_logprobs": [token(*pair) for pair in entry.top]}
        for entry in entries
    ]


def _finite(logprob: float) -> float:
    """JSON has no infinity: an impossible token has the log-probability -9999."""
    return max(logprob, -9999.0)


def usage_body(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def data_event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + compact_json(body) + b"\n\n"


def compact_json(body: Any) -> bytes:
    return _ENCODER.encode(body).encode()
