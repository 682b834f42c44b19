"""How many tokens a request may take, from its body alone. Pure.

The runtime validates the fields; a value that it will refuse is read as absent here.
"""

from __future__ import annotations

import msgspec

BYTES_PER_TOKEN = 3
"""Of a body in JSON. English text has about 4, other languages and code fewer; the end is settled exactly."""
DEFAULT_COMPLETION = 512
"""Where a request sets no maximum. It is extended while the answer is generated."""
_MOST = 2**31


class _Fields(msgspec.Struct):
    max_tokens: msgspec.Raw = msgspec.Raw(b"null")
    max_completion_tokens: msgspec.Raw = msgspec.Raw(b"null")
    max_output_tokens: msgspec.Raw = msgspec.Raw(b"null")
    n: msgspec.Raw = msgspec.Raw(b"1")
    prompt: msgspec.Raw = msgspec.Raw(b"null")


_DECODER = msgspec.json.Decoder(_Fields)


def tokens_of(body: bytes, context: int | None) -> tuple[int, int]:
    """Tokens of the prompt, estimated, and of all answers together, at most.

    `context`: tokens of prompt and answer together that the model takes, if that is known.
    """
    try:
        fields = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0, 0  # the request was parsed before, so this does not happen
    most = context or _MOST
    asked = [fields.max_tokens, fields.max_completion_tokens, fields.max_output_tokens]
    limits = [number for raw in asked if (number := _whole(raw)) is not None]
    completion = min(limits, default=DEFAULT_COMPLETION)
    answers = min(_whole(fields.n) or 1, 1024) * _prompts(fields.prompt)
    return min(len(body) // BYTES_PER_TOKEN + 1, most), min(completion, most) * answers


def _whole(raw: msgspec.Raw) -> int | None:
    text = bytes(raw)
    return min(int(text), _MOST) if text.isdigit() and len(text) < 20 and int(text) > 0 else None


def _prompts(raw: msgspec.Raw) -> int:
    """The number of prompts of a request for completions."""
    if not bytes(memoryview(raw)[:2]).startswith((b'["', b"[[")):
        return 1
    try:
        return max(1, len(msgspec.json.decode(raw, type=list[msgspec.Raw])))
    except msgspec.DecodeError:
        return 1
