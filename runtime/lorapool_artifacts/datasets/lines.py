"""Bytes to JSON objects, line by line, with the number of the line in each error.

JSON Lines (jsonlines.org) in UTF-8. A byte order mark, Windows line ends and blank lines at the end are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from lorapool_artifacts.datasets.errors import DatasetError, shown

MAX_LINE_BYTES = 4 * 2**20
"""Far above any context length; a longer line is a file of another format."""
_BOM = b"\xef\xbb\xbf"

JsonObject = dict[str, Any]


def read_objects(file: BinaryIO) -> Iterator[tuple[int, JsonObject]]:
    """Yields (line number from 1, object) without holding the file. Raises DatasetError for the first bad line."""
    blank: int | None = None
    for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 2), b""), 1):
        line = raw.removeprefix(_BOM) if number == 1 else raw
        text = line.rstrip(b"\r\n")
        if not text.strip():
            blank = blank or number
            continue
        if blank is not None:
            raise DatasetError(f"Line {blank} is blank. Remove it: only the end of a file may be blank.", line=blank)
        yield number, _object(text, number)


def _object(text: bytes, number: int) -> JsonObject:
    if len(text) > MAX_LINE_BYTES:
        _refuse(number, f"is longer than {MAX_LINE_BYTES} bytes; write one example per line")
    if b"\0" in text:
        _refuse(number, "holds a NUL byte; save the file as UTF-8 text")
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        _refuse(number, f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        _refuse(number, f"is not valid JSON: {_cause(error)}")
    if not isinstance(value, dict):
        _refuse(number, f"holds {_kind(value)}, not a JSON object; write one object per line")
    if b"\\ud" in text.lower():
        _check_surrogates(value, number)
    return value


def _check_surrogates(value: JsonObject, number: int) -> None:
    """JSON can escape half of a surrogate pair, which is not text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        _refuse(number, "holds an unpaired surrogate (\\ud800 to \\udfff), which is not valid text")


def _cause(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        ending = "; the line is cut off" if is_cut else ""
        return f"{error.msg[:1].lower()}{error.msg[1:]} (column {error.colno}){ending}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: object) -> str:
    return "an array" if isinstance(value, list) else "null" if value is None else f"the value {shown(value)}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse(number: int, why: str) -> NoReturn:
    raise DatasetError(f"Line {number} {why}.", line=number)
