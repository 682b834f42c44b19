"""The internal hop's SSE stream, split into what the client gets and what only the gateway reads. Pure.

Called by relay. Data events pass through byte for byte; comment lines, which carry cumulative usage, are taken
out. An event that never ends is refused, so a broken runtime cannot fill memory.
"""

from __future__ import annotations

import json

from lorapool_api.openai import ApiError
from lorapool_api.protocol import USAGE_COMMENT, Usage

EVENT_MAX_BYTES = 8 * 2**20
_DONE = b"data: [DONE]"
_ERROR = b'data: {"error"'


class EventTooLong(Exception):
    """No end of an event within EVENT_MAX_BYTES."""


class EventFilter:
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._usage: bytes | None = None
        self.done = False
        """`[DONE]` was passed on: the answer is whole."""
        self.failed = False
        """The runtime itself ended the stream with an error event."""

    def feed(self, chunk: bytes) -> bytes:
        """What of all bytes so far can be passed on now. Raises EventTooLong."""
        self._buffer += chunk
        end = self._buffer.rfind(b"\n\n")
        if end < 0:
            if len(self._buffer) > EVENT_MAX_BYTES:
                raise EventTooLong
            return b""
        block = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        passed = [kept for event in block.split(b"\n\n") if (kept := self._event(event))]
        return b"".join(event + b"\n\n" for event in passed)

    def usage(self) -> Usage | None:
        """The last cumulative count; what a client that left has consumed as well."""
        return None if self._usage is None else parse_usage(self._usage)

    def _event(self, event: bytes) -> bytes:
        if event.startswith(b":") or b"\n:" in event:
            lines = event.split(b"\n")
            for line in lines:
                if line.startswith(USAGE_COMMENT):
                    self._usage = line[len(USAGE_COMMENT) :]
            event = b"\n".join(line for line in lines if not line.startswith(b":"))
        if event.startswith(_DONE):
            self.done = True
        elif event.startswith(_ERROR):
            self.failed = True
        return event


def parse_usage(text: bytes | str) -> Usage | None:
    """None for what is no usage: a miscount is logged by the caller, never guessed."""
    try:
        return Usage.model_validate_json(text)
    except ValueError:
        return None


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that broke off; no [DONE] follows."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
