"""Starts the base: fetches its folder, starts the engine on it, makes its tokenizer and the store for its adapters.

Blocks for as long as fetching and loading take. The errors of the parts are raised as they are; `reason_of` turns one
into a sentence for the log.
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

from lorapool_api.base_modules import compact
from lorapool_artifacts.cache import DiskCache
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.files import ArtifactKind
from lorapool_artifacts.inspect import base_files_from_folder, inspect_base, names_of
from lorapool_artifacts.settings import FetchLimits, SourceSettings
from lorapool_artifacts.uri import PvcUri, parse_uri
from lorapool_artifacts.writer_folders import remove_dead
from lorapool_runtime.adapters.disk_store import DiskStore
from lorapool_runtime.adapters.source_access import SourceAccess
from lorapool_runtime.engines.choose import EngineFactory
from lorapool_runtime.openai.chats.chat_formats import ChatFormats
from lorapool_runtime.openai.chats.tokenizer import Tokenizer
from lorapool_runtime.openai.tools.grammar import GrammarCompiler
from lorapool_runtime.serving.service import LoadedBase, read_base_chat
from lorapool_runtime.settings import RuntimeSettings
from lorapool_runtime.startup_progress import StartupProgress

log = logging.getLogger(__name__)

LOW_WATER = 0.8
"""A full disk cache is emptied to this fraction."""
MIN_ROOM_BYTES = 64 * 2**20
"""Minimum of the disk cache that must be left for adapters."""


class BaseError(Exception):
    """The base cannot be served; the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class BaseFolder:
    path: Path
    digest: str | None
    names: tuple[str, ...]
    cached_bytes: int = 0
    """Its bytes in the disk cache of the adapters; 0 when it is stored elsewhere."""


def bring_up(
    settings: RuntimeSettings,
    make_engine: EngineFactory,
    progress: StartupProgress,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> LoadedBase:
    """Blocks until the engine runs. Calls `meanwhile` in a thread while the base is fetched, which is mostly waiting.

    Raises BaseError, ArtifactError, or what the engine raises.
    """
    sources = settings.sources.model_copy(update={"pvc_root": settings.pvc_root})
    started_s = time.monotonic()
    with _run_concurrently(meanwhile if "://" in settings.model else None):
        folder = base_folder(settings, sources, progress)
    progress.begin_load()
    log.info("base found", extra={"base": settings.label, "folder": str(folder.path), "digest": folder.digest or "-"})
    room_bytes = settings.cache_bytes - folder.cached_bytes
    if room_bytes < MIN_ROOM_BYTES:
        raise BaseError(
            f"The base takes {folder.cached_bytes} of the {settings.cache_bytes} bytes of the disk cache, which leaves "
            "too little for adapters: raise cache_bytes (the profile's cacheSizeLimit)."
        )
    files = base_files_from_folder(folder.path, sources.max_tensors)
    tokenizer = Tokenizer(folder.path, threads=settings.tokenize_threads, timeout_s=settings.template_timeout_s)
    engine = make_engine(settings, folder.path)
    engine.start()
    formats = ChatFormats(tokenizer, rows=engine.facts.vocab_size, eos_ids=engine.facts.eos_token_ids)
    formats.use_base(read_base_chat(settings.chat_file))
    grammars = GrammarCompiler(
        tokenizer.grammar_json(),
        vocab_size=engine.facts.vocab_size,
        eos_token_ids=engine.facts.eos_token_ids | tokenizer.eos_token_ids,
        timeout_s=settings.grammar_timeout_s,
    )
    facts = BaseFacts.of(engine.facts.modules, *files.names, *folder.names)
    cache = DiskCache(
        settings.cache_dir.expanduser() / "adapters", high_bytes=room_bytes, low_bytes=int(room_bytes * LOW_WATER)
    )
    cache.start()
    limits = FetchLimits(total_timeout_s=settings.fetch_timeout_s, min_bytes_per_s=settings.fetch_min_bytes_per_s)
    access = SourceAccess(sources, settings.source_rules_file)
    store = DiskStore(cache, facts, access, max_rank=settings.max_rank, fetch_limits=limits)
    log.info("base loaded", extra={"base": settings.label, "seconds": round(time.monotonic() - started_s, 1)})
    return LoadedBase(
        engine, tokenizer, formats, grammars, store, folder.digest, compact(engine.facts.modules, folder.digest)
    )


@contextlib.contextmanager
def _run_concurrently(work: Callable[[], None] | None) -> Iterator[None]:
    """Runs `work` in a thread while inside, and waits for it at the end."""
    thread = None if work is None else threading.Thread(target=work, name="during-fetch")
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        if thread is not None:
            thread.join()


def base_folder(settings: RuntimeSettings, sources: SourceSettings, progress: StartupProgress) -> BaseFolder:
    """The local folder of `settings.model`, fetched if it is a URI. A volume is read where it is mounted."""
    if "://" not in settings.model:
        path = Path(settings.model).expanduser()
        if not (path / "config.json").is_file():
            raise BaseError(
                f"{path} is not a model folder: it has no config.json. Give a model folder or a source URI."
            )
        return BaseFolder(path.resolve(), None, (path.name, settings.base_name))
    try:
        uri = parse_uri(settings.model)
    except ValueError as error:
        raise BaseError(f"{error}.") from error
    names = (*names_of(uri), settings.base_name)
    if isinstance(uri, PvcUri):
        found = asyncio.run(inspect_base(settings.model, settings.revision, sources))
        return BaseFolder(settings.pvc_root / uri.claim / uri.path, found.digest, names)
    return asyncio.run(_fetched(settings, sources, names, progress))


async def _fetched(
    settings: RuntimeSettings, sources: SourceSettings, names: tuple[str, ...], progress: StartupProgress
) -> BaseFolder:
    limits = FetchLimits(
        max_total_bytes=sources.base_max_bytes,
        total_timeout_s=sources.base_fetch_timeout_s,
        min_bytes_per_s=settings.fetch_min_bytes_per_s,
    )
    resolved = await resolve(settings.model, settings.revision, ArtifactKind.BASE, limits, sources)
    log.info("fetching the base", extra={"base": settings.label, "bytes": resolved.size_bytes})
    progress.begin_fetch(resolved.size_bytes)
    shares_cache = settings.base_cache_dir is None
    root = (settings.base_cache_dir or settings.cache_dir / "bases").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    remove_dead(root)
    path = await fetch(resolved, root, resume=True, on_progress=progress.fetched)
    return BaseFolder(path, folder_digest(path), names, resolved.size_bytes if shares_cache else 0)


def reason_of(error: BaseException) -> str:
    """One sentence for the log's last line."""
    if isinstance(error, ArtifactError):
        return f"{error.reason.value}: {error.message}"
    return str(error) or type(error).__name__
