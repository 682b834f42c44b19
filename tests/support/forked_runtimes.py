"""Real runtime processes (`python -m lorapool_runtime`) with a fake engine, forked from one that has imported all.

Only the engine, the adapters' files and the base's are fake: server, drain and exit are the product's. A start takes a
tenth of a second instead of seconds, so that a test can end hundreds of them. `command(socket)` starts one: it lives
as long as the process, takes its signals and exits with its code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

NOTICE_S = "TEST_DRAIN_NOTICE_S"
"""Variable with the runtimes' `drain_notice_s`, by default the product's."""
STEP_S = 0.005
REPEATS = 10


def expected(tag: str) -> str:
    """The answer with the weights of the source `…/<tag>`: some 90 tokens, half a second."""
    return f"I am {tag}. " * REPEATS


def command(path: Path) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", __file__, str(path))


@contextlib.contextmanager
def forking(folder: Path) -> Iterator[tuple[str, ...]]:
    """Runs the process that forks; yields the command that starts a runtime."""
    import subprocess

    path = folder / "fork.sock"
    code = f"import forked_runtimes; forked_runtimes.fork_runtimes({str(path)!r}, {str(folder)!r})"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE) as popen:
        try:
            assert popen.stdout is not None
            assert popen.stdout.readline() == b"ready\n"
            yield command(path)
        finally:
            popen.kill()


def start_one(path: str) -> int:
    """The client: asks for a runtime with its own environment and output, passes signals on, returns its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"\0"], [1, 2])
        connection.sendall(json.dumps(dict(os.environ)).encode() + b"\n")
        answers = connection.makefile("rb")
        pid = int(answers.readline())
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return int(answers.readline() or 1)


def fork_runtimes(path: str, folder: str) -> None:
    """The server: forks a runtime for each connection until it is killed."""
    import fakes_runtime

    import lorapool_runtime.__main__  # noqa: F401  imported here, once, for all of them

    tokenizer = fakes_runtime.save_byte_tokenizer(Path(folder) / "tokenizer")
    fakes_runtime.tokenizer_of(tokenizer).close()
    fakes_runtime.tokenizer_of.cache_clear()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _run(connection, tokenizer)
            connection.close()


def _run(connection: socket.socket, tokenizer: Path) -> None:
    """The runtime's process, until it ends."""
    for target, source in zip((1, 2), socket.recv_fds(connection, 1, 2)[1], strict=True):
        os.dup2(source, target)
    os.environ.clear()
    with connection.makefile("rb") as asked:
        os.environ.update(json.loads(asked.readline()))
    connection.sendall(f"{os.getpid()}\n".encode())
    threading.Thread(target=_end_with_client, args=(connection,), daemon=True).start()
    code = 1
    try:
        code = _runtime(tokenizer)
    finally:
        with contextlib.suppress(OSError):
            connection.sendall(f"{code}\n".encode())
        os._exit(code)


def _end_with_client(connection: socket.socket) -> None:
    connection.recv(1)
    os._exit(137)


def _runtime(tokenizer: Path) -> int:
    import fakes_runtime

    from lorapool_runtime import __main__ as process
    from lorapool_runtime.openai.tools.grammar import GrammarCompiler
    from lorapool_runtime.serving.service import LoadedBase

    def bring_up(*_: object, **__: object) -> LoadedBase:
        engine = fakes_runtime.FakeEngine(reply=lambda tag, *_: expected(tag), step_s=STEP_S)
        engine.start()
        made = fakes_runtime.tokenizer_of(tokenizer)
        grammars = GrammarCompiler(
            made.grammar_json(), vocab_size=fakes_runtime.VOCAB, eos_token_ids={fakes_runtime.EOS}, timeout_s=5.0
        )
        return LoadedBase(
            engine, made, fakes_runtime.formats_of(tokenizer), grammars, fakes_runtime.FakeStore(),
            fakes_runtime.digest_of_name("base"),
        )  # fmt: skip

    process.bring_up = bring_up  # type: ignore[assignment]
    notice = os.environ.get(NOTICE_S)
    return process.main(["--drain-notice-s", notice] if notice else [])


if __name__ == "__main__":
    sys.exit(start_one(sys.argv[1]))
