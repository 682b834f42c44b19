"""Steps a person can follow: what runs now, for how long, and when it fails which, why, and what to do.

Called by every module of the demo. Commands run through `command`, whose output goes to a log file and, where a step
takes long, line by line to the screen.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


class StepError(Exception):
    """A step failed; the text says why and what to do."""

    def __init__(self, message: str, step: str = "") -> None:
        super().__init__(message)
        self.step = step


@dataclass
class Steps:
    """Prints the steps and remembers how long each took."""

    total: int
    log: Path
    seconds: dict[str, float] = field(default_factory=dict)
    _number: int = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One numbered step; any StepError inside is given its name."""
        self._number += 1
        print(f"\033[1m[{self._number}/{self.total}] {name}\033[0m", flush=True)
        started = time.monotonic()
        try:
            yield
        except StepError as error:
            error.step = error.step or name
            raise
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"      done in {self.seconds[name]:.0f} s", flush=True)

    def command(
        self,
        argv: Sequence[str | Path],
        *,
        remedy: str,
        timeout_s: float,
        env: dict[str, str] | None = None,
        show: bool = True,
        stdin: str | None = None,
    ) -> str:
        """Runs a command and returns its stdout; its stderr and (when `show`) progress lines are shown and logged.

        Raises StepError with the last lines and the remedy when it fails or takes longer than `timeout_s`.
        """
        words = [str(word) for word in argv]
        recent: deque[str] = deque(maxlen=25)
        out: list[str] = []
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(words)}\n")
            process = subprocess.Popen(
                words,
                env=env,
                text=True,
                errors="replace",
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            _pump(process, stdin, timeout_s, out, recent, log.write, show)
        if process.returncode == 0:
            return "".join(out)
        shown = "".join(recent) or "".join(out[-25:])
        why = f"took longer than {timeout_s:.0f} s" if process.returncode == -9 else f"ended with {process.returncode}"
        raise StepError(f"`{' '.join(words[:6])}` {why}:\n{shown}\n{remedy}\nThe whole log: {self.log}")


def _pump(
    process: subprocess.Popen[str],
    stdin: str | None,
    timeout_s: float,
    out: list[str],
    recent: deque[str],
    write: Callable[[str], object],
    show: bool,
) -> None:
    import threading

    def read_out() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            out.append(line)
            write(line)

    def read_err() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            recent.append(line)
            write(line)
            if show and line.strip():
                sys.stdout.write(f"      {line.rstrip()[:150]}\n")
                sys.stdout.flush()

    readers = [threading.Thread(target=read_out), threading.Thread(target=read_err)]
    for reader in readers:
        reader.start()
    if stdin is not None:
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for reader in readers:
        reader.join(5)


def until(what: str, check: Callable[[], str | None], *, timeout_s: float, remedy: str, every_s: float = 2.0) -> None:
    """Waits until `check` returns None; its text is what is still missing and is shown every ten seconds."""
    deadline = time.monotonic() + timeout_s
    shown = 0.0
    while True:
        missing = check()
        if missing is None:
            return
        now = time.monotonic()
        if now > deadline:
            raise StepError(f"{what}: still {missing} after {timeout_s:.0f} s.\n{remedy}")
        if now - shown > 10:
            print(f"      {what}: {missing}", flush=True)
            shown = now
        time.sleep(every_s)
