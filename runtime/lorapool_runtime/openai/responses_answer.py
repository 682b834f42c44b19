"""Bodies and stream events of `/v1/responses`, built from deltas.

The answer is a list of items: reasoning, messages, and calls of functions. Each is streamed as it is generated: its
beginning, its deltas, its end. Pure.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapool_api.protocol import Usage
from lorapool_runtime.engines.interface import FinishReason
from lorapool_runtime.openai.reasoning import ReasoningReader, ReasoningStart
from lorapool_runtime.openai.response import Delta, ResponseHead, TokenBytes, TokenText, chat_logprobs, compact_json
from lorapool_runtime.openai.tools.tool_calls import ToolCallDelta, ToolCallReader

Event = dict[str, Any]

_REPEATED: Mapping[str, Any] = {
    # parameters that the answer repeats, with their defaults
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "user": None,
}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:24]}"


@dataclass(slots=True)
class _Message:
    """Text of the answer."""

    id: str = field(default_factory=lambda: _new_id("msg"))
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def body(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": "".join(self.pieces), "annotations": [], "logprobs": self.logprobs}

    def begin(self, at: Event) -> Iterator[Event]:
        yield {"type": "response.content_part.added", **at, "content_index": 0, "part": self.part()}

    def end(self, at: Event) -> Iterator[Event]:
        part, place = self.part(), {**at, "content_index": 0}
        yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": self.logprobs}
        yield {"type": "response.content_part.done", **place, "part": part}


@dataclass(slots=True)
class _Reasoning:
    id: str = field(default_factory=lambda: _new_id("rs"))
    pieces: list[str] = field(default_factory=list)

    def body(self, status: str) -> dict[str, Any]:
        text = {"type": "reasoning_text", "text": "".join(self.pieces)}
        content = [] if status == "in_progress" else [text]
        return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def begin(self, at: Event) -> Iterator[Event]:
        yield from ()

    def end(self, at: Event) -> Iterator[Event]:
        yield {"type": "response.reasoning_text.done", **at, "content_index": 0, "text": "".join(self.pieces)}


@dataclass(slots=True)
class _Call:
    name: str
    id: str = field(default_factory=lambda: _new_id("fc"))
    call_id: str = field(default_factory=lambda: _new_id("call"))
    pieces: list[str] = field(default_factory=list)

    def body(self, status: str) -> dict[str, Any]:
        own = {"call_id": self.call_id, "name": self.name, "arguments": "".join(self.pieces)}
        return {"id": self.id, "type": "function_call", "status": status, **own}

    def begin(self, at: Event) -> Iterator[Event]:
        yield from ()

    def end(self, at: Event) -> Iterator[Event]:
        done = {"name": self.name, "arguments": "".join(self.pieces)}
        yield {"type": "response.function_call_arguments.done", **at, **done}


_Item = _Message | _Reasoning | _Call


class ResponsesBuilder:
    """One answer in progress: `add` collects a delta for the whole `body`, `chunks` encodes it for a stream."""

    def __init__(
        self,
        head: ResponseHead,
        given: Mapping[str, Any],
        reader: ToolCallReader | None,
        reasoning: ReasoningStart,
        token_text: TokenText,
        token_bytes: TokenBytes,
    ) -> None:
        """`given`: the fields of the request. `reader`: None if the answer has no calls."""
        self._head = head
        self._given = given
        self._reader = reader
        self._reasoner = None if reasoning is ReasoningStart.NONE else ReasoningReader(reasoning)
        self._token_text = token_text
        self._token_bytes = token_bytes
        self._done: list[dict[str, Any]] = []
        self._item: _Item | None = None
        self._finish: FinishReason | None = None
        self._sequence_number = -1

    def add(self, delta: Delta) -> None:
        for _ in self._events(delta):
            pass

    def body(self, usage: Usage) -> dict[str, Any]:
        return self._response(self._status(), usage)

    def chunks(self, delta: Delta) -> list[bytes]:
        """The events of one delta; those of the response's beginning first."""
        first = [] if self._sequence_number >= 0 else ["response.created", "response.in_progress"]
        begin = [self._encoded({"type": kind, "response": self._response("in_progress", None)}) for kind in first]
        return begin + [self._encoded(event) for event in self._events(delta)]

    def closing(self, usage: Usage) -> list[bytes]:
        """The last event, with the whole response."""
        status = self._status()
        return [self._encoded({"type": f"response.{status}", "response": self._response(status, usage)})]

    # --- events ---------------------------------------------------------------------------

    def _events(self, delta: Delta) -> Iterator[Event]:
        logprobs = chat_logprobs(delta.logprobs, self._token_text, self._token_bytes)
        reasoning, content = self._apart(delta)
        if reasoning:
            yield from self._reason(reasoning)
        for part in self._read(content, delta.finish):
            if isinstance(part, ToolCallDelta):
                yield from self._call(part)
            else:
                yield from self._text(part, logprobs)
                logprobs = []
        if delta.finish is not None:
            self._finish = delta.finish
            if not self._done and self._item is None:
                yield from self._begin(_Message())
            yield from self._end(self._status())

    def _apart(self, delta: Delta) -> tuple[str, str]:
        """The delta's reasoning, and the rest of its text."""
        if self._reasoner is None:
            return "", delta.text
        found = self._reasoner.push(delta.text, delta.tokens)
        if delta.finish is None:
            return found
        rest = self._reasoner.finish()
        return found.reasoning + rest.reasoning, found.content + rest.content

    def _read(self, text: str, finish: FinishReason | None) -> Sequence[str | ToolCallDelta]:
        if self._reader is None:
            return [text] if text else []
        parts = self._reader.push(text)
        return parts if finish is None else [*parts, *self._reader.finish()]

    def _reason(self, text: str) -> Iterator[Event]:
        if not isinstance(self._item, _Reasoning):
            yield from self._end("completed")
            yield from self._begin(_Reasoning())
        assert isinstance(self._item, _Reasoning)
        self._item.pieces.append(text)
        yield {"type": "response.reasoning_text.delta", **self._at(), "content_index": 0, "delta": text}

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if not isinstance(self._item, _Message):
            yield from self._end("completed")
            yield from self._begin(_Message())
        assert isinstance(self._item, _Message)
        self._item.pieces.append(text)
        self._item.logprobs += logprobs
        place = {**self._at(), "content_index": 0}
        yield {"type": "response.output_text.delta", **place, "delta": text, "logprobs": logprobs}

    def _call(self, part: ToolCallDelta) -> Iterator[Event]:
        if part.name is not None:
            yield from self._end("completed")
            yield from self._begin(_Call(part.name))
        assert isinstance(self._item, _Call)
        if part.arguments:
            self._item.pieces.append(part.arguments)
            yield {"type": "response.function_call_arguments.delta", **self._at(), "delta": part.arguments}

    def _begin(self, item: _Item) -> Iterator[Event]:
        self._item = item
        yield {"type": "response.output_item.added", "output_index": len(self._done), "item": item.body("in_progress")}
        yield from item.begin(self._at())

    def _end(self, status: str) -> Iterator[Event]:
        if self._item is None:
            return
        yield from self._item.end(self._at())
        body = self._item.body(status)
        yield {"type": "response.output_item.done", "output_index": len(self._done), "item": body}
        self._done.append(body)
        self._item = None

    def _at(self) -> Event:
        assert self._item is not None
        return {"item_id": self._item.id, "output_index": len(self._done)}

    def _encoded(self, event: Event) -> bytes:
        self._sequence_number += 1
        body = {**event, "sequence_number": self._sequence_number}
        return f"event: {event['type']}\ndata: ".encode() + compact_json(body) + b"\n\n"

    # --- the response ---------------------------------------------------------------------

    def _status(self) -> str:
        return "incomplete" if self._finish is FinishReason.LENGTH else "completed"

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        given = {name: value for name, value in self._given.items() if name in _REPEATED and value is not None}
        return {
            "id": f"resp_{self._head.id}",
            "object": "response",
            "created_at": self._head.created_unix_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._head.model,
            "output": list(self._done),
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": None if usage is None else self._usage_body(usage),
            **_REPEATED,
            **given,
        }

    def _usage_body(self, usage: Usage) -> dict[str, Any]:
        reasoning_tokens = 0 if self._reasoner is None else self._reasoner.tokens
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
