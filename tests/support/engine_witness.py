"""The runtime with a witness of its engine, as a process: `python engine_witness.py FILE [POINT COUNT]`.

The witness writes every token that the engine samples to FILE, with the prompt that it is for, and knows nothing of
how the product counts. With POINT, the process kills itself when it comes there for the COUNT-th time; never between
the engine's token and its line in FILE, so that the file is complete.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorapool_runtime.__main__ as process
from lorapool_runtime.accounts import accounting, journal, journal_file
from lorapool_runtime.engines.interface import GenerationRequest, TokenOutput

POINTS = (
    "token",
    "before a write",
    "within a write",
    "after a write",
    "before the row is free",
    "after a new file is written",
    "after a new file took its place",
)


class Witness:
    def __init__(self, engine: Any, file: int, point: str, count: int) -> None:
        self._engine, self._file = engine, file
        self._point, self._left = point, count
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: GenerationRequest, sink: Callable[[TokenOutput], None]) -> None:
        def seen(output: TokenOutput) -> None:
            with self._lock:
                if output.token_id is not None:
                    os.write(self._file, json.dumps([request.prompt_ids, output.token_id]).encode() + b"\n")
                sink(output)
            if output.token_id is not None:
                self.come_to("token")

        self._engine.submit(request, seen)

    def come_to(self, point: str, before: Callable[[], object] = lambda: None) -> None:
        if point == self._point:
            self._left -= 1
            if not self._left:
                with self._lock:
                    before()
                    os.kill(os.getpid(), signal.SIGKILL)


def patch(witness: Callable[[], Witness | None]) -> None:
    """Lets the process come to the points."""

    def at(point: str, before: Callable[[], object] = lambda: None) -> None:
        if (found := witness()) is not None:
            found.come_to(point, before)

    append = journal_file.JournalFile.append

    def patched_append(self: Any, lines: bytes) -> None:
        at("before a write")
        at("within a write", lambda: os.write(self._fd, lines[: len(lines) // 2]))
        append(self, lines)
        at("after a write")

    forget = accounting.Accounting._forget

    def patched_forget(self: Any, live: Any) -> None:
        at("before the row is free")
        forget(self, live)

    replace = journal_file.Rewriting.replace

    def patched_replace(self: Any, later: Any, target: Any) -> Any:
        at("after a new file is written")
        made = replace(self, later, target)
        at("after a new file took its place")
        return made

    patches: list[tuple[Any, str, Any]] = [
        (journal_file.JournalFile, "append", patched_append),
        (accounting.Accounting, "_forget", patched_forget),
        (journal_file.Rewriting, "replace", patched_replace),
    ]
    for owner, name, new in patches:
        setattr(owner, name, new)
    journal.COMPACT_BYTES = 1000


def main() -> int:
    file = os.open(Path(sys.argv[1]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    point, count = (sys.argv[2], int(sys.argv[3])) if len(sys.argv) > 2 else ("", 0)
    made: list[Witness] = []
    make = process.make_engine

    def make_engine(settings: Any, folder: Any) -> Any:
        made.append(Witness(make(settings, folder), file, point, count))
        return made[0]

    patch(lambda: made[0] if made else None)
    process.make_engine = make_engine
    return process.main([])


if __name__ == "__main__":
    sys.exit(main())
