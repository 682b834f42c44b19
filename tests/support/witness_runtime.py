"""`python witness_runtime.py LOG ...`: the runtime with a witness inside that writes every sampled token to a file.

It shares nothing with the accounts of the runtime: it wraps `submit` of the engine, and reads the attempt from the
request's header. A line is written by one system call before the runtime is given the token, so that a kill loses none.
"""

from __future__ import annotations

import contextvars
import os
import sys
from collections.abc import Callable
from typing import Any

from aiohttp import web

import lorapool_runtime.__main__ as runtime_main

_attempt: contextvars.ContextVar[str] = contextvars.ContextVar("attempt", default="")


@web.middleware
async def _remember_attempt(request: web.Request, handler: Any) -> Any:
    _attempt.set(request.headers.get("x-lorapool-attempt", ""))
    return await handler(request)


def main(log: str, arguments: list[str]) -> int:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    true_app, true_engine = runtime_main.make_app, runtime_main.make_engine

    def make_app(*given: Any) -> web.Application:
        app = true_app(*given)
        app.middlewares.insert(0, _remember_attempt)
        return app

    def make_engine(*given: Any) -> Any:
        engine = true_engine(*given)
        submit = engine.submit

        def witnessed(request: Any, sink: Callable[[Any], None]) -> Any:
            attempt = _attempt.get()

            def put(output: Any) -> None:
                counts = f"{output.prompt_tokens} {output.cached_tokens} {output.completion_tokens}"
                os.write(file, f"{attempt} {output.request_id} {counts}\n".encode())
                sink(output)

            return submit(request, put)

        engine.submit = witnessed
        return engine

    runtime_main.make_app = make_app
    runtime_main.make_engine = make_engine
    return runtime_main.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
