"""The requests that run and the minute that is open, in memory that outlives the process.

The table is a file mapped into memory: an update is a store, without a system call, and what is stored survives
SIGKILL. The next process of the pod reads it. Every number is one aligned store of 8 bytes, so no number is ever half
written. Texts are written before the state that makes them valid.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_MAGIC = int.from_bytes(b"lrpool01", "little")
_WORD = 8
_HEADER_WORDS = 32
_ROW_WORDS = 160
_LINE_WORDS = 72
_LINES_BEYOND_ROWS = 1024

# words of the header
_AT_MAGIC, _AT_ROWS, _AT_LINES, SIGN_NS, SIGN_UNIX_MS, LAST_SEQ, SPAN_NS, SPAN_MINUTE, SPAN_SEQ, LINES_USED = range(10)
_AT_BOOT = 16
# words of a row, then its text
STATE, ENDED_SEQ, OUTCOME, PROMPT, CACHED, COMPLETION, GPU, SEQUENCES, STARTED_MS = range(9)
_ROW_TEXT = 9
# words of a line, then its text
LINE_GPU, LINE_BYTE_NS_HIGH, LINE_BYTE_NS_LOW, LINE_BYTES, LINE_SINCE_NS = range(5)
_LINE_TEXT = 5

_FREE, _LIVE = 0, 1


@dataclass(frozen=True, slots=True)
class FoundRow:
    """A request that ran when its process was killed."""

    texts: tuple[str, ...]
    ended_seq: int
    """Number of its record, if the process was about to write that."""
    outcome: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    gpu_ns: int
    sequences: int
    started_unix_ms: int


@dataclass(frozen=True, slots=True)
class FoundLine:
    """The part of one account in the minute that was open."""

    texts: tuple[str, ...]
    gpu_ns: int
    byte_ns: int
    """Up to the last sign of life."""


@dataclass(frozen=True, slots=True)
class FoundTable:
    """What a killed process has left."""

    boot_id: str
    sign_ns: int
    sign_unix_ms: int
    last_seq: int
    span_ns: int
    """When the open minute began, on the monotonic clock of that process."""
    span_minute_unix_s: int
    span_seq: int
    """Number of the open minute's record, if the process was about to write that."""
    rows: list[FoundRow]
    lines: list[FoundLine]
    damaged: int
    """Rows and lines that cannot be read."""


class RunningTable:
    """`words` are the numbers of the table; `row` and `line` give where one begins."""

    def __init__(self, path: Path | None, boot_id: str, rows: int) -> None:
        """`path` None: in memory alone. Raises OSError where the file cannot be made or the disk has no room for it."""
        self.rows, self.lines = rows, rows + _LINES_BEYOND_ROWS
        size = _size(rows, self.lines)
        self._map = mmap.mmap(-1, size) if path is None else _mapped(path, size)
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")
        self._free = list(range(rows - 1, -1, -1))
        boot = boot_id.encode()[:64]
        self._bytes[_AT_BOOT * _WORD : _AT_BOOT * _WORD + len(boot)] = boot
        self.words[_AT_ROWS], self.words[_AT_LINES] = rows, self.lines
        self.words[_AT_MAGIC] = _MAGIC

    def close(self) -> None:
        self.words.release()
        self._bytes.release()
        self._map.close()

    # --- rows ---

    def take(self, texts: Sequence[str], *, sequences: int, started_unix_ms: int) -> int | None:
        """The place of a row for a request that begins; None when all are taken."""
        if not self._free:
            return None
        at = self._row(self._free.pop())
        words = self.words
        for word in range(at + 1, at + _ROW_TEXT):
            words[word] = 0
        words[at + SEQUENCES], words[at + STARTED_MS] = sequences, started_unix_ms
        self._write_text(at + _ROW_TEXT, _ROW_WORDS - _ROW_TEXT, texts)
        words[at + STATE] = _LIVE
        return at

    def give_back(self, at: int) -> None:
        self.words[at + STATE] = _FREE
        self._free.append((at - _HEADER_WORDS) // _ROW_WORDS)

    # --- the open minute ---

    def begin_minute(self, *, span_ns: int, minute_unix_s: int) -> None:
        words = self.words
        words[LINES_USED] = 0
        words[SPAN_NS], words[SPAN_MINUTE] = span_ns, minute_unix_s
        words[SPAN_SEQ] = 0

    def take_line(self, texts: Sequence[str]) -> int | None:
        """The place of a line for an account; None when all are taken."""
        number = self.words[LINES_USED]
        if number == self.lines:
            return None
        at = self._line(number)
        for word in range(at, at + _LINE_TEXT):
            self.words[word] = 0
        self._write_text(at + _LINE_TEXT, _LINE_WORDS - _LINE_TEXT, texts)
        self.words[LINES_USED] = number + 1
        return at

    def _row(self, number: int) -> int:
        return _HEADER_WORDS + number * _ROW_WORDS

    def _line(self, number: int) -> int:
        return _HEADER_WORDS + self.rows * _ROW_WORDS + number * _LINE_WORDS

    def _write_text(self, at: int, words: int, texts: Sequence[str]) -> None:
        text = json.dumps(texts, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > (words - 1) * _WORD:
            text = json.dumps([one[:32] for one in texts], ensure_ascii=False, separators=(",", ":")).encode()
        self.words[at] = len(text) << 32 | zlib.crc32(text)
        self._bytes[(at + 1) * _WORD : (at + 1) * _WORD + len(text)] = text


def read_table(path: Path) -> FoundTable | None:
    """What the process that made the file has left; None where it is not such a file."""
    data = path.read_bytes()
    if len(data) < _HEADER_WORDS * _WORD:
        return None
    words = memoryview(data)[: len(data) // _WORD * _WORD].cast("Q")
    rows, lines = words[_AT_ROWS], words[_AT_LINES]
    if words[_AT_MAGIC] != _MAGIC or rows > 2**20 or lines > 2**21 or len(data) < _size(rows, lines):
        return None
    found_rows: list[FoundRow] = []
    found_lines: list[FoundLine] = []
    damaged = 0
    for number in range(rows):
        at = _HEADER_WORDS + number * _ROW_WORDS
        if words[at + STATE] != _LIVE:
            continue
        texts = _read_text(data, words, at + _ROW_TEXT, _ROW_WORDS - _ROW_TEXT)
        if texts is None:
            damaged += 1
            continue
        found_rows.append(
            FoundRow(
                texts,
                ended_seq=words[at + ENDED_SEQ],
                outcome=words[at + OUTCOME],
                prompt_tokens=words[at + PROMPT],
                cached_tokens=words[at + CACHED],
                completion_tokens=words[at + COMPLETION],
                gpu_ns=words[at + GPU],
                sequences=words[at + SEQUENCES],
                started_unix_ms=words[at + STARTED_MS],
            )
        )
    sign_ns = max(words[SIGN_NS], words[SPAN_NS])
    for number in range(min(words[LINES_USED], lines)):
        at = _HEADER_WORDS + rows * _ROW_WORDS + number * _LINE_WORDS
        texts = _read_text(data, words, at + _LINE_TEXT, _LINE_WORDS - _LINE_TEXT)
        if texts is None:
            damaged += 1
            continue
        byte_ns = (words[at + LINE_BYTE_NS_HIGH] << 64) + words[at + LINE_BYTE_NS_LOW]
        byte_ns += words[at + LINE_BYTES] * max(0, sign_ns - words[at + LINE_SINCE_NS])
        found_lines.append(FoundLine(texts, words[at + LINE_GPU], byte_ns))
    boot = data[_AT_BOOT * _WORD : _AT_BOOT * _WORD + 64].rstrip(b"\0").decode("ascii", "replace")
    return FoundTable(
        boot,
        sign_ns=sign_ns,
        sign_unix_ms=words[SIGN_UNIX_MS],
        last_seq=words[LAST_SEQ],
        span_ns=words[SPAN_NS],
        span_minute_unix_s=words[SPAN_MINUTE],
        span_seq=words[SPAN_SEQ],
        rows=found_rows,
        lines=found_lines,
        damaged=damaged,
    )


def _read_text(data: bytes, words: memoryview, at: int, size: int) -> tuple[str, ...] | None:
    length, crc = words[at] >> 32, words[at] & 0xFFFFFFFF
    text = data[(at + 1) * _WORD : (at + 1) * _WORD + length]
    if length > (size - 1) * _WORD or zlib.crc32(text) != crc:
        return None
    try:
        return tuple(map(str, json.loads(text)))
    except ValueError:
        return None


def _size(rows: int, lines: int) -> int:
    return (_HEADER_WORDS + rows * _ROW_WORDS + lines * _LINE_WORDS) * _WORD


def _mapped(path: Path, size: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)  # a store into a page that the full disk has no room for would end the process
        return mmap.mmap(fd, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
