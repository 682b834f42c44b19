"""Runs in vLLM's own processes before their work: ties their life to ours, and keeps why a start failed.

vLLM sends its configuration to each process that it starts, and ours contains an `InEachProcess`: unpickling it calls
`begin` there. Of a failed start vLLM only says that it failed, since the cause is an exception in another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VARIABLE = "LORAPOOL_VLLM_FAILURES"
"""Names the file of the failures, for the processes that are started meanwhile."""
MAX_CHARS = 4000
_PR_SET_PDEATHSIG = 1


class InEachProcess(str):
    """A text in vLLM's configuration that calls `begin` wherever another process unpickles it."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[str, int], InEachProcess], tuple[str, int]]:
        return begin, (str(self), os.getpid())

    def __deepcopy__(self, _: dict[int, Any]) -> InEachProcess:
        return self


def begin(text: str, parent: int) -> InEachProcess:
    """In another process than the parent: ends it with the parent, and records its failures."""
    if os.getpid() != parent:
        end_with_parent(parent)
        record_failures()
    return InEachProcess(text)


def end_with_parent(parent: int) -> None:
    """The kernel kills this process as soon as the thread that started it has ended, however that ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() == 1 != parent:  # it ended before
        os._exit(1)


def record_failures() -> None:
    """Appends each exception that vLLM logs to the file that the environment names."""
    path, make = os.environ.get(VARIABLE), logging.getLogRecordFactory()
    if not path:
        return

    def record(*args: Any, **more: Any) -> logging.LogRecord:
        made = make(*args, **more)
        error = made.exc_info[1] if made.exc_info else None
        if error is not None and made.levelno >= logging.ERROR:
            line = json.dumps({"type": type(error).__name__, "message": str(error)[:MAX_CHARS]})
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        return made

    logging.setLogRecordFactory(record)


class Failures:
    """The exceptions that vLLM's processes have logged since the start, oldest first."""

    def __init__(self) -> None:
        number, name = tempfile.mkstemp(prefix="vllm-failures-")
        os.close(number)
        self._path = Path(name)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Processes that are started while inside record theirs."""
        os.environ[VARIABLE] = str(self._path)
        try:
            yield
        finally:
            os.environ.pop(VARIABLE, None)

    def read(self) -> list[tuple[str, str]]:
        """(type, message) of each."""
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):  # two processes may have written at the same time
                one = json.loads(line)
                found.append((str(one["type"]), str(one["message"])))
        return found

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
