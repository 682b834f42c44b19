"""Brings up the base: its folder, the engine on it, its tokenizer, and the store for its adapters.

`__main__` calls it in a thread of its own; it blocks for as long as fetching and loading take. It raises what the
parts raise; `__main__` turns that into one sentence and an exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorapool_artifacts.cache import DiskCache
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import clean_leftovers, fetch, folder_digest, resolve
from lorapool_artifacts.files import ArtifactKind
from lorapool_artifacts.inspect import base_facts_from_folder, inspect_base, names_of
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.uri import PvcUri, parse_uri
from lorapool_runtime.adapters.disk_store import DiskStore
from lorapool_runtime.engines.interface import Engine
from lorapool_runtime.openai.grammar import GrammarCompiler
from lorapool_runtime.openai.tokenizer import Tokenizer
from lorapool_runtime.serving.service import LoadedBase
from lorapool_runtime.settings import RuntimeSettings

log = logging.getLogger(__name__)

LOW_WATER = 0.8
"""A full disk cache is emptied to this share."""
MIN_ROOM_BYTES = 64 * 2**20
"""Of the disk cache, for adapters, beside the base."""


class BaseError(Exception):
    """The base cannot be served; the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class BaseFolder:
    path: Path
    digest: str | None
    names: tuple[str, ...]
    cached_bytes: int = 0
    """What it takes of the disk cache; 0 where it lies elsewhere."""


EngineFactory = Callable[[RuntimeSettings, Path], Engine]


def torch_engine(settings: RuntimeSettings, folder: Path) -> Engine:
    """The engine that is used; imported only here, so that all else runs without torch."""
    from transformers.utils import logging as transformers_logging

    from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine

    transformers_logging.disable_progress_bar()
    return TorchEngine(
        EngineConfig(
            model_dir=str(folder),
            dtype=settings.dtype,
            device=settings.device,
            max_model_len=settings.max_model_len,
            max_rank=settings.max_rank,
            slots=settings.slots,
            max_batch=settings.max_batch,
            kv_bytes=settings.kv_bytes,
            max_batch_tokens=settings.max_batch_tokens,
            max_prefill_tokens=settings.max_prefill_tokens,
            prefix_cache=settings.prefix_cache,
            threads=settings.threads,
            cache_dir=str(settings.cache_dir.expanduser() / "measured"),
        )
    )


def import_torch() -> None:
    """Seconds of Python; torch alone, since two threads must not import packages that import each other."""
    with contextlib.suppress(ImportError, OSError):  # `torch_engine` comes upon it again, and says so
        import torch  # noqa: F401


def bring_up(
    settings: RuntimeSettings,
    make_engine: EngineFactory,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> LoadedBase:
    """Blocks until the engine runs; `meanwhile` is called in a thread while a base is fetched, which mostly waits.

    Raises BaseError, ArtifactError, or what the engine raises.
    """
    sources = settings.sources.model_copy(update={"pvc_root": settings.pvc_root})
    started_s = time.monotonic()
    with _beside(meanwhile if "://" in settings.model else None):
        folder = base_folder(settings, sources)
    log.info("base found", extra={"base": settings.label, "folder": str(folder.path), "digest": folder.digest or "-"})
    room_bytes = settings.cache_bytes - folder.cached_bytes
    if room_bytes < MIN_ROOM_BYTES:
        raise BaseError(
            f"The base takes {folder.cached_bytes} of the {settings.cache_bytes} bytes of the disk cache, which leaves "
            "too little for adapters: raise cache_bytes (the profile's cacheSizeLimit)."
        )
    facts = base_facts_from_folder(folder.path).with_names(*folder.names)
    tokenizer = Tokenizer(folder.path, threads=settings.tokenize_threads, timeout_s=settings.template_timeout_s)
    engine = make_engine(settings, folder.path)
    engine.start()
    grammars = GrammarCompiler(
        tokenizer.grammar_json(),
        vocab_size=engine.facts.vocab_size,
        eos_token_ids=engine.facts.eos_token_ids | tokenizer.eos_token_ids,
        timeout_s=settings.grammar_timeout_s,
    )
    cache = DiskCache(
        settings.cache_dir.expanduser() / "adapters", high_bytes=room_bytes, low_bytes=int(room_bytes * LOW_WATER)
    )
    cache.start()
    store = DiskStore(cache, facts, sources, max_rank=settings.max_rank, fetch_timeout_s=settings.fetch_timeout_s)
    log.info("base loaded", extra={"base": settings.label, "seconds": round(time.monotonic() - started_s, 1)})
    return LoadedBase(engine, tokenizer, grammars, store, folder.digest)


@contextlib.contextmanager
def _beside(work: Callable[[], None] | None) -> Iterator[None]:
    """Runs `work` in a thread while inside; leaving waits for it."""
    thread = None if work is None else threading.Thread(target=work, name="beside-fetch")
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        if thread is not None:
            thread.join()


def base_folder(settings: RuntimeSettings, sources: SourceSettings) -> BaseFolder:
    """The local folder of `settings.model`, fetched when it is a URI. Volumes are read where they are mounted."""
    if "://" not in settings.model:
        path = Path(settings.model).expanduser()
        if not (path / "config.json").is_file():
            raise BaseError(f"{path} is no model folder: it holds no config.json. Give a folder or a source URI.")
        return BaseFolder(path.resolve(), None, (path.name, settings.base_name))
    try:
        uri = parse_uri(settings.model)
    except ValueError as error:
        raise BaseError(f"{error}.") from error
    names = (*names_of(uri), settings.base_name)
    if isinstance(uri, PvcUri):
        found = asyncio.run(inspect_base(settings.model, settings.revision, sources))
        return BaseFolder(settings.pvc_root / uri.claim / uri.path, found.digest, names)
    return asyncio.run(_fetched(settings, sources, names))


async def _fetched(settings: RuntimeSettings, sources: SourceSettings, names: tuple[str, ...]) -> BaseFolder:
    resolved = await resolve(settings.model, settings.revision, ArtifactKind.BASE, None, sources)
    log.info("fetching the base", extra={"base": settings.label, "bytes": resolved.size_bytes})
    root = settings.cache_dir.expanduser() / "bases"
    root.mkdir(parents=True, exist_ok=True)
    clean_leftovers(root)
    path = await fetch(resolved, root)
    return BaseFolder(path, folder_digest(path), names, resolved.size_bytes)


def reason_of(error: BaseException) -> str:
    """One sentence for the log's last line."""
    if isinstance(error, ArtifactError):
        return f"{error.reason.value}: {error.message}"
    return str(error) or type(error).__name__
