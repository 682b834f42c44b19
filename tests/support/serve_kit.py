"""`python -m lorapool_serve` as a process, with its folder and what it printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import yaml

FAKE_RUNTIME = Path(__file__).with_name("fake_runtime_process.py")
TIMEOUT_S = 240.0
PROGRAM = "import sys; from lorapool_serve.__main__ import main; sys.exit(main(sys.argv[2:], command={command}))"


@dataclass
class Served:
    folder: Path
    state: Path
    popen: subprocess.Popen[bytes]

    @property
    def output(self) -> str:
        return self.state.with_suffix(".out").read_text()

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.state / "summary.json").read_text()))

    def until(self, true: Callable[[], object]) -> None:
        """Waits for a condition. Fails with the output when it does not come or the process ends."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not true():
            assert self.popen.poll() is None, self.output
            assert time.monotonic() < deadline_s, self.output
            time.sleep(0.02)

    def write(self, name: str, *objects: dict[str, Any]) -> None:
        (self.folder / name).write_text(yaml.safe_dump_all(objects))

    def ask(self, model: str, **more: Any) -> str:
        """The answer of a model, by the unmodified client."""
        summary = self.summary()
        client = openai.OpenAI(base_url=summary["gateway_url"] + "/v1", api_key=summary["api_key"], max_retries=0)
        messages = more.pop("messages", [{"role": "user", "content": "hello"}])
        with client:
            answer = client.chat.completions.create(model=model, messages=messages, **more)
        return str(answer.choices[0].message.content)

    def children(self) -> list[int]:
        """The processes that it started."""
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.popen.pid)], capture_output=True, text=True)
        return [int(text) for text in listed.stdout.split()]

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.popen.send_signal(signal.SIGINT)
        return self.popen.wait(TIMEOUT_S)


def arguments(folder: Path, state: Path, command: tuple[str, ...], *more: str) -> list[str]:
    program = PROGRAM.format(command=repr(command))
    return [sys.executable, "-c", program, "serve", str(folder), "--state", str(state), "--port", "0", *more]


@contextmanager
def serving(folder: Path, state: Path, command: tuple[str, ...], *more: str) -> Iterator[Served]:
    """The process; `command` starts its runtimes."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LORAPOOL_RUNTIME")}
    with state.with_suffix(".out").open("wb") as out:
        popen = subprocess.Popen(arguments(folder, state, command, *more), stdout=out, stderr=out, env=environ)
    served = Served(folder, state, popen)
    try:
        yield served
    finally:
        if popen.poll() is None:
            served.interrupt()


def base(name: str = "tiny", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name}
    return {"kind": "BaseModel", "metadata": metadata, "spec": {"source": {"uri": "pvc://models/tiny"}, **spec}}


def adapter(name: str, base: str = "tiny", uri: str | None = None, **spec: Any) -> dict[str, Any]:
    source = {"uri": uri or f"pvc://adapters/{name}"}
    metadata = {"name": name}
    return {
        "kind": "LoraAdapter",
        "metadata": metadata,
        "spec": {"baseModelRef": {"name": base}, "source": source, **spec},
    }
