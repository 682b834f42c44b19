"""Bodies and chunks of the OpenAI surface, built from deltas.

`server` makes one `Answer` per request and asks it for the whole body or for one chunk after another. Pure: it knows
neither sockets nor the engine.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapool_api.protocol import Usage
from lorapool_runtime.generation import Delta
from lorapool_runtime.interface import FinishReason, TokenLogprob

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of one answer repeats."""

    chat: bool
    model: str
    created_unix_s: int
    fingerprint: str
    include_usage: bool = False
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
class _Choice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    begun: bool = False
    offset: int = 0
    """Characters of all tokens so far, for `text_offset`."""


class Answer:
    """One answer under way; `take` folds a delta in for the whole body, `chunks` writes it out at once."""

    def __init__(
        self,
        head: Head,
        *,
        choices: int,
        with_logprobs: bool,
        echo: Sequence[str],
        token_text: Callable[[int], str],
        token_bytes: Callable[[int], list[int]],
    ) -> None:
        self._head = head
        self._with_logprobs = with_logprobs
        self._token_text = token_text
        self._token_bytes = token_bytes
        self._echo = echo
        self._choices = [_Choice() for _ in range(choices)]

    # --- whole --------------------------------------------------------------------------

    def take(self, delta: Delta) -> None:
        choice = self._choices[delta.number]
        choice.text += delta.text
        choice.logprobs.extend(delta.logprobs)
        if delta.finish is not None:
            choice.finish = _FINISH[delta.finish]

    def whole(self, usage: Usage) -> dict[str, Any]:
        kind = "chat.completion" if self._head.chat else "text_completion"
        choices = [self._whole_choice(number, choice) for number, choice in enumerate(self._choices)]
        return {**self._head.body(kind, choices), "usage": usage_body(usage)}

    def _whole_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice, choice.logprobs)
        if self._head.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}
        text = self._echoed(number) + choice.text
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}

    # --- streamed -----------------------------------------------------------------------

    def chunks(self, delta: Delta) -> list[bytes]:
        """The data events of one delta: the role first, then text, then the end."""
        choice = self._choices[delta.number]
        parts: list[tuple[dict[str, Any], Any, str | None]] = []  # (delta or text, logprobs, finish_reason)
        finish = None if delta.finish is None else _FINISH[delta.finish]
        logprobs = self._logprobs(choice, delta.logprobs)
        if self._head.chat:
            if not choice.begun:
                parts.append(({"delta": {"role": "assistant", "content": ""}}, None, None))
            if delta.text or logprobs:
                parts.append(({"delta": {"content": delta.text}}, logprobs, None))
            if finish is not None:
                parts.append(({"delta": {}}, None, finish))
        else:
            text = ("" if choice.begun else self._echoed(delta.number)) + delta.text
            parts.append(({"text": text}, logprobs, finish))
        choice.begun = True
        return [
            self._event([{"index": delta.number, **part, "logprobs": own_logprobs, "finish_reason": end}], None)
            for part, own_logprobs, end in parts
        ]

    def usage_chunk(self, usage: Usage) -> bytes:
        """The extra chunk of `stream_options.include_usage`."""
        return self._event([], usage)

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
        body = self._head.body("chat.completion.chunk" if self._head.chat else "text_completion", choices)
        if self._head.include_usage:
            body["usage"] = None if usage is None else usage_body(usage)
        return data_event(body)

    # --- parts --------------------------------------------------------------------------

    def _echoed(self, number: int) -> str:
        if not self._echo:
            return ""
        return self._echo[number * len(self._echo) // len(self._choices)]

    def _logprobs(self, choice: _Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs or (not entries and self._head.chat):
            return None
        return self._chat_logprobs(entries) if self._head.chat else self._completion_logprobs(choice, entries)

    def _chat_logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {**self._token(entry.token_id, entry.logprob), "top_logprobs": [self._token(*pair) for pair in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token_text(token_id),
            "logprob": logprob,
            "bytes": self._token_bytes(token_id),
        }

    def _completion_logprobs(self, choice: _Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._token_text(entry.token_id) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self._token_text(token_id): logprob for token_id, logprob in entry.top} for entry in entries
            ],
            "text_offset": offsets,
        }


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def data_event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + compact_json(body) + b"\n\n"


def compact_json(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


DONE_EVENT = b"data: [DONE]\n\n"
