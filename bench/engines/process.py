"""Engines under test: one process group each, all loaded at the same time, run in turn, so that rounds can alternate.

Between its turns an engine is stopped (SIGSTOP): worker threads of several engines spin while they wait and would take
the cores of the engine whose turn it is. `EngineProcess` is the measuring side; `serve` is the engine's side, which may
run in another virtual environment. They exchange one JSON object per line: the batch in, seconds and tokens out. The
engine takes the time, so the cost of the pipe is not part of any figure. An engine that exits or does not answer raises
EngineProcessError with the end of its log; nothing is measured after that.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from common.workloads import Batch

START_TIMEOUT_S = 400.0
BATCH_TIMEOUT_S = 400.0


class EngineProcessError(Exception):
    """An engine cannot be started, exited, or took too long."""


@dataclass(frozen=True, slots=True)
class Outcome:
    tokens_per_s: float
    tokens: list[list[int]]
    """Per request, in the order of the batch."""


class EngineProcess:
    """A running engine, as a context manager: leaving it ends the process."""

    def __init__(self, name: str, command: Sequence[str], logs: Path, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = logs / f"{name}.log"
        logs.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(environ or {})},
                start_new_session=True,  # a group of its own, so that its workers stop with it
            )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._left = b""
        self.versions: dict[str, str] = {}

    def wait_until_loaded(self, timeout_s: float = START_TIMEOUT_S) -> None:
        self.versions = self._line(timeout_s)["versions"]
        self._signal(signal.SIGSTOP)

    def run(self, batch: Batch, timeout_s: float = BATCH_TIMEOUT_S) -> Outcome:
        answer = self.ask({"do": "run", "batch": asdict(batch)}, timeout_s)
        return Outcome(batch.tokens / answer["seconds"], answer["tokens"])

    def ask(self, what: Mapping[str, Any], timeout_s: float = BATCH_TIMEOUT_S) -> dict[str, Any]:
        """Continues the process until it has answered."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed("has ended") from error
        answer = self._line(timeout_s)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self, patience_s: float = 20.0) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):  # it has ended by itself
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self._signal(signal.SIGKILL)  # and its remaining children
        self._process.wait()
        self._selector.close()
        self._process.stdout.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(20.0 if error is None else 0.5)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of the group have ended
            os.killpg(self._process.pid, number)

    def _line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ends_s = time.monotonic() + timeout_s
        while b"\n" not in self._left:
            if not self._selector.select(max(0.0, ends_s - time.monotonic())):
                raise self._failed(f"did not answer for {timeout_s:.0f} s")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise self._failed("has ended")
            self._left += data
        line, _, self._left = self._left.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, why: str) -> EngineProcessError:
        tail = self._log.read_text(errors="replace")[-1500:]
        return EngineProcessError(f"{self.name} {why}; the end of {self._log}:\n{tail}")


# --- the engine's side ---------------------------------------------------------------


class Engine(Protocol):
    """The interface that an engine under test implements."""

    versions: dict[str, str]

    def prepare(self, batch: Batch) -> None:
        """Not timed: work that this engine does once and not per request, such as loading the adapters."""
        ...

    def generate(self, batch: Batch) -> list[list[int]]:
        """Timed: returns the new tokens of each request."""
        ...


def serve(
    load: Callable[[], Engine], more: Mapping[str, Callable[[Any, Mapping[str, Any]], Any]] | None = None
) -> None:
    """Loads the engine, reports its versions, and answers until its input ends. `more` adds commands: (engine, request)
    -> answer.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to the log
    engine = load()
    answers.write(json.dumps({"versions": engine.versions}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        if more and asked["do"] in more:
            answers.write(json.dumps(more[asked["do"]](engine, asked)) + "\n")
            continue
        given = asked["batch"]
        batch = Batch(tuple(map(tuple, given["prompts"])), tuple(given["adapters"]), given["new"])
        engine.prepare(batch)
        began_s = time.perf_counter()
        tokens = engine.generate(batch)
        seconds = time.perf_counter() - began_s
        answers.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")
