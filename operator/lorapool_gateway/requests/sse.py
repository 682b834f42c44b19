"""Splits what a runtime sends as server-sent events into the client's answer and the usage for the gateway. Pure.

Data events pass through byte for byte. Comment lines, which contain the cumulative usage, are removed. An event
without an end is refused, so that a broken runtime cannot fill the memory.
"""

from __future__ import annotations

import json

from lorapool_api.openai import ApiError
from lorapool_api.protocol import USAGE_COMMENT, Usage

EVENT_MAX_BYTES = 8 * 2**20
_END, _GAP = b"\n\n", b"\n\n\n"
_DONE = b"data: [DONE]"
DONE_EVENT = _DONE + _END
_LAST = (_DONE, b"event: response.completed\n", b"event: response.incomplete\n")
"""How the last event of a stream begins: [DONE], or for /v1/responses the event with the whole response."""
_LAST_LATER = tuple(_END + begin for begin in _LAST)
_DATA = b"data: "
_ERROR_BODY = b'{"error"'
_ERROR = _DATA + _ERROR_BODY


class EventTooLongError(Exception):
    """An event is longer than EVENT_MAX_BYTES."""


class EventFilter:
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._usage: bytes | None = None
        self.done = False
        """The last event was passed on: the response is complete."""
        self.failed = False
        """The runtime itself ended the stream with an error event."""

    def feed(self, chunk: bytes) -> bytes:
        """The complete events among the bytes received so far, without comments. Raises EventTooLongError."""
        if not self.is_whole(chunk):
            self._buffer += chunk
            end = self._buffer.rfind(_END) + len(_END)
            if end < len(_END):
                if len(self._buffer) > EVENT_MAX_BYTES:
                    raise EventTooLongError
                return b""
            chunk = bytes(self._buffer[:end])
            del self._buffer[:end]
        events = self._without_comments(chunk)
        if events.startswith(_LAST) or any(map(events.__contains__, _LAST_LATER)):
            self.done = True
        if events.startswith(_ERROR) or _END + _ERROR in events:
            self.failed = True
        return events

    def is_whole(self, chunk: bytes) -> bool:
        """Whether `feed` returns all events of this chunk, and keeps nothing of it."""
        return not self._buffer and chunk.endswith(_END)

    def usage(self) -> Usage | None:
        """The last cumulative count, also for a client that disconnected before the end."""
        return None if self._usage is None else parse_usage(self._usage)

    def _without_comments(self, events: bytes) -> bytes:
        if events.startswith(USAGE_COMMENT):
            end = events.index(b"\n")
            usage, rest = events[len(USAGE_COMMENT) : end], events[end + 1 :]
            if not rest.startswith((b"\n", b":")) and b"\n:" not in rest:
                self._usage = usage  # the usual: one event, which begins with its usage
                return rest
        lines = events.split(b"\n")
        kept = [line for line in lines if not line.startswith(b":")]
        if len(kept) == len(lines):
            return events
        for line in reversed(lines):
            if line.startswith(USAGE_COMMENT):
                self._usage = line[len(USAGE_COMMENT) :]
                break
        events = b"\n".join(kept).lstrip(b"\n")
        while _GAP in events:  # what is left of an event that had comments alone
            events = events.replace(_GAP, _END)
        return events


class WholeAnswer:
    """Takes apart a whole answer that arrives as events: the usage so far in comments, at last one data event."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: list[bytes] = []
        self._usage: bytes | None = None
        self.size = 0
        """Bytes of the data event so far."""

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes. Raises EventTooLongError for a comment without an end."""
        if self._parts:
            self._add(chunk)
            return
        data, begin = self._rest + chunk, 0
        while not data.startswith(_DATA, begin):
            end = data.find(b"\n", begin)
            if end < 0:
                self._rest = data[begin:]
                if len(self._rest) > EVENT_MAX_BYTES:
                    raise EventTooLongError
                return
            if data.startswith(USAGE_COMMENT, begin):
                self._usage = data[begin + len(USAGE_COMMENT) : end]
            begin = end + 1
        self._rest = b""
        self._add(data[begin + len(_DATA) :])

    def _add(self, part: bytes) -> None:
        self._parts.append(part)
        self.size += len(part)

    def take(self) -> bytes:
        """The data that was not taken before, without what may be the end of the event."""
        data = b"".join(self._parts)
        self._parts = [data[-2:]]
        return data[:-2]

    def body(self) -> bytes | None:
        """The data that was not taken, after the last byte was fed; None if the event is not complete."""
        data = b"".join(self._parts)
        return data[:-2] if data.endswith(b"\n\n") else None

    def usage(self) -> Usage | None:
        """The last cumulative count."""
        return None if self._usage is None else parse_usage(self._usage)


def is_error(body: bytes) -> bool:
    """Whether the body of an answer is an error that the runtime reports after it has begun the answer."""
    return body.startswith(_ERROR_BODY)


def parse_usage(text: bytes | str) -> Usage | None:
    """The usage, or None if the text is not a valid one."""
    try:
        return Usage.model_validate_json(text)
    except ValueError:
        return None


def error_in(events: bytes) -> bytes | None:
    """The body of the error that the first of these events is; None if it is none."""
    return events[len(_DATA) :].split(b"\n", 1)[0] if events.startswith(_ERROR) else None


def error_event(error: ApiError) -> bytes:
    """The event of a stream that was cut off."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
