"""`python -m lorapool_serve DIR`: serves the BaseModels and LoraAdapters of a folder on 127.0.0.1 until Ctrl-C.

Exit code 0 after Ctrl-C, and when another process serves already; 2 when the folder cannot be served.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from lorapool_api.common import LABEL_API_KEY
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_artifacts.settings import SourceSettings
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.process import drain, run, running
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.settings import Settings
from lorapool_serve.console import Console, models, settled, started
from lorapool_serve.controller import Controller, LocalInspector
from lorapool_serve.folder import NAMESPACE, Folder
from lorapool_serve.node import COMMAND, HOST, Node
from lorapool_serve.objects import SECRET, Objects, object_of

READ_INTERVAL_S = 0.25
"""The folder is read this often."""
SETTLE_S = 10.0
"""The summary is written this long after the bases have started, even if a source has not answered by then."""
SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class Options:
    folder: Path
    state: Path
    """Folder for summary, logs and caches."""
    port: int
    local_bases: dict[str, Path]


class ServeError(Exception):
    """The folder cannot be served; the message names the remedy."""


def main(argv: Sequence[str] | None = None, command: Sequence[str] = COMMAND) -> int:
    """`command` starts a runtime."""
    options = read_options(argv)
    try:
        with only_one(options.state) as url:
            if url is not None:
                print(f"Another process serves already: {url} (end it with Ctrl-C, or choose another --state folder)")
                return 0
            run(serve(options, command))
    except ServeError as error:
        print(f"lorapool serve: {error}", file=sys.stderr)
        return 2
    return 0


def read_options(argv: Sequence[str] | None) -> Options:
    """The command line. Ends the process with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog="lorapool serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the YAML files; pvc://A/B is read from <folder>/A/B")
    parser.add_argument("--port", type=int, default=8080, help="port of the OpenAI API (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=Path(".serve"), help="summary and logs (default: %(default)s)")
    parser.add_argument(
        "--local-base", action="append", default=[], metavar="URI=FOLDER", help="read a base's source from a folder"
    )
    args = parser.parse_args(argv)
    pairs = [text.partition("=") for text in args.local_base]
    for uri, _, folder in pairs:
        if not (Path(folder) / "config.json").is_file():
            parser.error(f"--local-base {uri}={folder}: the folder contains no config.json")
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder; name the one with your BaseModel and LoraAdapter files")
    bases = {uri: Path(folder).resolve() for uri, _, folder in pairs}
    return Options(args.folder.resolve(), args.state.resolve(), args.port, bases)


@contextlib.contextmanager
def only_one(state: Path) -> Iterator[str | None]:
    """Holds the lock of the state folder inside; yields the URL of the process that has it, else None."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            yield lock.read() or "it is still starting"
            return
        lock.truncate(0)
        (state / SUMMARY).unlink(missing_ok=True)
        yield None


async def serve(options: Options, command: Sequence[str]) -> None:
    """Runs everything until a signal arrives. Raises ServeError."""
    began_s = time.monotonic()
    logging.basicConfig(filename=options.state / "serve.log", level=logging.INFO, force=True)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    console, tokens, key = Console(), RuntimeTokens([secrets.token_hex(32)]), f"lp-{secrets.token_urlsafe(32)}"
    objects = Objects(console.event)
    objects.put(api_key_object(key))
    folder = Folder(options.folder, objects, console.line)
    sources = SourceSettings.from_env(os.environ, pvc_root=options.folder)
    controller = Controller(objects, LocalInspector(sources, options.local_bases), tokens)
    settings = Settings(
        keys_namespace=NAMESPACE,
        listen_host=HOST,
        api_port=options.port,
        metrics_port=0,
        shutdown_delay_s=0,
        drain_timeout_s=2,
    )
    here = {
        "LORAPOOL_RUNTIME_PVC_ROOT": str(options.folder),
        "LORAPOOL_SOURCE_PRIVATE_HOSTS": ",".join(sources.private_hosts),
        "LORAPOOL_OCI_INSECURE_HOSTS": ",".join(sources.oci_insecure_hosts),
    }
    async with AsyncExitStack() as stack:
        node = Node(objects, options.state, here, options.local_bases, command)
        try:
            gateway = await stack.enter_async_context(running(settings, tokens, objects, objects, Metrics()))
        except OSError as error:
            raise ServeError(f"port {options.port}: {error.strerror}. Choose another one with --port.") from error
        url = f"http://{HOST}:{gateway.api_port}"
        (options.state / "lock").write_text(url)
        console.line(f"Serving {options.folder} at {url}/v1. The first start reads the base; Ctrl-C ends everything.")
        node.start()
        work = [
            asyncio.create_task(controller.run(), name="controller"),
            asyncio.create_task(watch(folder, objects, console, options.state / SUMMARY, url, key, began_s)),
            asyncio.create_task(stop.wait()),
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await drain(gateway, settings)
            await node.close()
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)


async def watch(
    folder: Folder, objects: Objects, console: Console, summary: Path, url: str, key: str, began_s: float
) -> None:
    """Reads the folder again and again, prints what has changed, and keeps the summary current."""
    started_s, written = None, None
    while True:
        folder.read()
        console.changes(objects)
        if started_s is None and objects.of("BaseModel") and started(objects):
            started_s = time.monotonic()
        if started_s is not None and (settled(objects) or time.monotonic() > started_s + SETTLE_S):
            names = models(objects)
            if written is None:
                console.line(f"\nReady after {time.monotonic() - began_s:.0f} s. {hint(url, key, names)}")
            if names != written:
                write_summary(summary, url, key, names)
                written = names
        await asyncio.sleep(READ_INTERVAL_S)


def hint(url: str, key: str, names: Sequence[str]) -> str:
    """What to try."""
    if not names:
        return "No model can be served; the warnings above say why."
    body = json.dumps({"model": names[-1], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    return f"""Try:
  curl {url}/v1/models -H "Authorization: Bearer {key}"
  curl {url}/v1/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
    -d '{body}'
or, with the openai package: OpenAI(base_url="{url}/v1", api_key="{key}")
"""


def write_summary(path: Path, url: str, key: str, names: Sequence[str]) -> None:
    """For programs. The file contains the key, so only its owner can read it."""
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"gateway_url": url, "api_key": key, "models": list(names)}, file, indent=2)
    draft.rename(path)


def api_key_object(key: str) -> dict[str, object]:
    """The Secret of a key that may use every model."""
    data = {"keySha256": hashlib.sha256(key.encode()).hexdigest(), "namespaces": "*"}
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    metadata = {"labels": {LABEL_API_KEY: "true"}}
    return object_of(SECRET, ObjectRef("lorapool-serve", "key"), metadata=metadata, data=encoded)


if __name__ == "__main__":
    sys.exit(main())
