"""Splits a runtime's SSE stream into the events for the client and the usage for the gateway. Pure.

Data events pass through byte for byte. Comment lines, which contain the cumulative usage, are removed. An event
without an end is refused, so that a broken runtime cannot fill the memory.
"""

from __future__ import annotations

import json

from lorapool_api.openai import ApiError
from lorapool_api.protocol import USAGE_COMMENT, Usage

EVENT_MAX_BYTES = 8 * 2**20
_DONE = b"data: [DONE]"
_ERROR = b'data: {"error"'


class EventTooLongError(Exception):
    """An event is longer than EVENT_MAX_BYTES."""


class EventFilter:
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._usage: bytes | None = None
        self.done = False
        """`[DONE]` was passed on: the response is complete."""
        self.failed = False
        """The runtime itself ended the stream with an error event."""

    def feed(self, chunk: bytes) -> bytes:
        """The complete events among the bytes received so far, without comments. Raises EventTooLongError."""
        self._buffer += chunk
        end = self._buffer.rfind(b"\n\n")
        if end < 0:
            if len(self._buffer) > EVENT_MAX_BYTES:
                raise EventTooLongError
            return b""
        block = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        passed = [kept for event in block.split(b"\n\n") if (kept := self._event(event))]
        return b"".join(event + b"\n\n" for event in passed)

    def usage(self) -> Usage | None:
        """The last cumulative count, also for a client that disconnected before the end."""
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
    """The usage, or None if the text is not a valid one."""
    try:
        return Usage.model_validate_json(text)
    except ValueError:
        return None


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that was cut off; no [DONE] follows."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
