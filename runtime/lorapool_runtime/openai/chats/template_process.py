"""Processes that render chat templates (`template_worker`), and how long each may take.

A process is started with its first job and kept. One that does not answer in time is killed, and the next job gets a
new one: a template that never ends, or needs more memory than it may have, costs its own requests and nothing else.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from queue import LifoQueue
from typing import Any

from lorapool_runtime.openai.chats.template_worker import LENGTH

_PROGRAM = Path(__file__).with_name("template_worker.py")
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
"""All that a process inherits: none of the runtime's credentials."""
PENALTY_S = 60.0
"""A template that did not end in time is not tried again for this long, for the same tenant."""
MAX_PENALTIES = 1024
FILE_PATIENCE = 5
"""An adapter's tokenizer file may take so many times the time of a template: no request waits for it alone, and a busy
machine must not refuse an adapter. The processor time is bounded as for a template."""


class TemplateRefusedError(Exception):
    """The template refuses its input, or cannot be rendered; the message says why."""


class TemplateTimeoutError(TemplateRefusedError):
    """The template did not end in time."""


class TemplateProcesses:
    """Renders in at most `count` processes at a time. Thread-safe; every method blocks."""

    def __init__(self, count: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: LifoQueue[_Process] = LifoQueue()
        for _ in range(count):
            self._idle.put(_Process())
        self._all = list(self._idle.queue)
        self._penalties: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Ends the processes; one that renders is killed."""
        for process in self._all:
            process.close()

    def render(self, template: str, *, tenant: str = "", **job: Any) -> str:
        """The text of a prompt. Raises TemplateRefusedError."""
        self._check_penalty(tenant, template)
        try:
            value: str = self._run({"do": "render", "template": template, **job})
        except TemplateTimeoutError:
            self._punish(tenant, template)
            raise
        return value

    def literals(self, template: str) -> tuple[str, ...]:
        """The texts that the template itself contains. Raises TemplateRefusedError for one that does not compile."""
        return tuple(self._run({"do": "literals", "template": template}))

    def tokenizer_facts(self, path: Path) -> dict[str, Any]:
        """What `template_worker.tokenizer_facts` finds. Raises TemplateRefusedError."""
        facts: dict[str, Any] = self._run({"do": "tokenizer", "path": str(path)}, restarts=True)
        return facts

    def _run(self, job: dict[str, Any], *, restarts: bool = False) -> Any:
        process, wait_s = self._idle.get(), self._timeout_s * (FILE_PATIENCE if restarts else 1)
        try:
            answer = process.answer(json.dumps({**job, "seconds": self._timeout_s}).encode(), wait_s)
            if restarts:
                process.close()  # it keeps the memory that a large file took
        finally:
            self._idle.put(process)
        if "refusal" in answer:
            raise TemplateRefusedError(answer["refusal"])
        return answer["value"]

    def _check_penalty(self, tenant: str, template: str) -> None:
        with self._lock:
            until_s = self._penalties.get((tenant, template), 0.0)
        if time.monotonic() < until_s:
            raise TemplateTimeoutError(_late(self._timeout_s))

    def _punish(self, tenant: str, template: str) -> None:
        with self._lock:
            self._penalties[tenant, template] = time.monotonic() + PENALTY_S
            if len(self._penalties) > MAX_PENALTIES:
                self._penalties.popitem(last=False)


class _Process:
    """One process, started when it is needed. Used by one thread at a time."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None

    def answer(self, job: bytes, timeout_s: float) -> dict[str, Any]:
        """Raises TemplateRefusedError when the process ends or is late."""
        popen = self._started()
        try:
            found: dict[str, Any] = json.loads(_exchange(popen, LENGTH.pack(len(job)) + job, timeout_s))
        except TimeoutError:
            self.close()
            raise TemplateTimeoutError(_late(timeout_s)) from None
        except (OSError, EOFError):
            self.close()
            raise TemplateRefusedError("it needs too much memory or time") from None
        except BaseException:
            self.close()
            raise
        return found

    def _started(self) -> subprocess.Popen[bytes]:
        if self._popen is not None and self._popen.poll() is not None:
            self.close()  # it ended by itself between two jobs
        if self._popen is None:
            environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
            self._popen = subprocess.Popen(
                [sys.executable, "-I", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                bufsize=0,
            )
            for pipe in (self._popen.stdin, self._popen.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
        return self._popen

    def close(self) -> None:
        popen, self._popen = self._popen, None
        if popen is not None:
            popen.kill()
            for pipe in (popen.stdin, popen.stdout):
                assert pipe is not None
                pipe.close()
            popen.wait()


def _exchange(popen: subprocess.Popen[bytes], data: bytes, timeout_s: float) -> bytes:
    """Writes `data` and reads one answer. Raises TimeoutError, OSError or EOFError."""
    assert popen.stdin is not None
    assert popen.stdout is not None
    ends_s = time.monotonic() + timeout_s
    left, found = memoryview(data), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(popen.stdin, selectors.EVENT_WRITE)
        while left:
            _wait(selector, ends_s)
            left = left[os.write(popen.stdin.fileno(), left[: 64 * 1024]) :]
        selector.unregister(popen.stdin)
        selector.register(popen.stdout, selectors.EVENT_READ)
        while len(found) < LENGTH.size or len(found) < LENGTH.size + LENGTH.unpack_from(found)[0]:
            _wait(selector, ends_s)
            part = os.read(popen.stdout.fileno(), 1 << 20)
            if not part:
                raise EOFError
            found += part
    return bytes(found[LENGTH.size :])


def _wait(selector: selectors.BaseSelector, ends_s: float) -> None:
    if not selector.select(max(0.0, ends_s - time.monotonic())):
        raise TimeoutError


def _late(timeout_s: float) -> str:
    return f"it did not end within {timeout_s:g} s"
