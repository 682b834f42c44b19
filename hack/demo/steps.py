"""What the steps of the demo run: commands whose output is shown and logged, and waits with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from demo.schedule import Step, StepError

INTERRUPT_GRACE_S = 60.0


class Console:
    """Prints lines of concurrently running steps, each under its step's name. Lines are never mixed."""

    def __init__(self) -> None:
        self.total = 1
        self.last: dict[str, float] = {}
        """Step -> seconds in the last run."""
        self.seconds: dict[str, float] = {}
        """Step -> seconds in this run."""
        self._number = 0
        self._lock = threading.Lock()

    def started(self, step: Step) -> None:
        self._number += 1
        last = f" ({self.last[step.name]:.0f} s last time)" if step.name in self.last else ""
        self._print(f"\033[1m[{self._number}/{self.total}] {step.name}: {step.title}{last}\033[0m")

    def done(self, step: Step, seconds: float) -> None:
        self.seconds[step.name] = round(seconds, 1)
        self.line(step.name, f"done in {seconds:.0f} s")

    def line(self, step: str, text: str) -> None:
        """One line of a step's output, cut to the width of a screen."""
        self._print(f"      {step:12} {text.rstrip()[:140]}")

    def _print(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)


@dataclass
class Commands:
    """Starts the commands of all steps, each in a process group of its own, and can interrupt all that are running."""

    log: Path
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        remedy: str,
        timeout_s: float,
        show: Callable[[str], None] | None = None,
        stdin: str | None = None,
    ) -> str:
        """Runs a command and returns its standard output; standard error goes to the log and line by line to `show`.

        Raises StepError with its last lines and the remedy when it fails or takes longer than `timeout_s`.
        """
        words = [str(word) for word in argv]
        recent: deque[str] = deque(maxlen=25)
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(words)}\n")
            process = self._start(words)
            out: list[str] = []
            readers = [
                _reader(process.stdout, out.append, log.write),
                _reader(process.stderr, recent.append, log.write, show or _ignore),
            ]
            self._feed(process, stdin)
            late = self._wait(process, timeout_s)
            for reader in readers:
                reader.join(5)
        if process.returncode == 0:
            return "".join(out)
        why = f"took longer than {timeout_s:.0f} s" if late else f"ended with {process.returncode}"
        shown = "".join(recent) or "".join(out[-25:])
        raise StepError(f"`{' '.join(words[:6])}` {why}:\n{shown}\n{remedy}\nThe whole log: {self.log}")

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped.is_set():
                raise StepError("not started: the demo is ending")
            process = subprocess.Popen(
                words, text=True, errors="replace", start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            self._running.add(process)
        return process

    def _feed(self, process: subprocess.Popen[str], stdin: str | None) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(stdin or "")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended without reading; its exit status says why

    def _wait(self, process: subprocess.Popen[str], timeout_s: float) -> bool:
        """Waits for the end; True if the command had to be ended because it was late."""
        try:
            process.wait(timeout_s)
            return False
        except subprocess.TimeoutExpired:
            end([process])
            return True
        finally:
            with self._lock:
                self._running.discard(process)

    def until(
        self,
        check: Callable[[], str | None],
        *,
        show: Callable[[str], None],
        timeout_s: float,
        remedy: str,
        every_s: float = 2.0,
    ) -> None:
        """Waits until `check` returns None; what it returns is what is still missing, shown every ten seconds.

        Raises StepError with the remedy after `timeout_s`, and at once when the commands are stopped.
        """
        deadline = time.monotonic() + timeout_s
        shown = 0.0
        while (missing := check()) is not None:
            now = time.monotonic()
            if now > deadline:
                raise StepError(f"still {missing} after {timeout_s:.0f} s.\n{remedy}")
            if now - shown > 10:
                show(missing)
                shown = now
            if self._stopped.wait(every_s):
                raise StepError("stopped: the demo is ending")

    def stop(self) -> None:
        """Ends all running commands and refuses new ones. Each is asked first, so that it can clean up."""
        with self._lock:
            self._stopped.set()
            running = list(self._running)
        end(running)


def end(processes: Sequence[subprocess.Popen[str]], grace_s: float = INTERRUPT_GRACE_S) -> None:
    """Interrupts each process group, waits for its leader to clean up, and kills what is left of the group."""
    for process in processes:
        _signal_group(process.pid, signal.SIGINT)
    deadline = time.monotonic() + grace_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _ignore(line: str) -> None:
    pass


def _reader(stream: IO[str] | None, *sinks: Callable[[str], object]) -> threading.Thread:
    """A thread that gives each line to every sink, until the stream ends."""
    assert stream is not None

    def read() -> None:
        with stream:
            for line in stream:
                for sink in sinks:
                    sink(line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def write_json(path: Path, content: object, *, mode: int = 0o644) -> None:
    """Replaces the file in one step: a reader sees the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    partial.replace(path)
