"""Adapters as verified folders on this machine: the disk and source tiers.

A folder on disk is used without contacting the source, which may be down. Every folder that is returned has the
requested digest and has been checked against the base. A folder is hashed and checked once per process, and again
when its files have changed: hashing takes as long as the rest of a load from disk.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lorapool_api.common import FailureReason
from lorapool_api.protocol import (
    ErrorDetail,
    NamespaceCredentials,
    ResolveAnswer,
    ResolveRequest,
    SourceRef,
    Tier,
)
from lorapool_artifacts.cache import DiskCache
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import resolve
from lorapool_artifacts.files import ArtifactKind
from lorapool_artifacts.inspect import inspect_adapter, inspect_adapter_folder
from lorapool_artifacts.settings import AdapterLimits, FetchLimits
from lorapool_runtime.adapters.source_access import SourceAccess
from lorapool_runtime.background import lower_thread_priority

MAX_INSPECTIONS = 2
"""Folders hashed and checked concurrently: this takes processor time that serving needs."""
MAX_REMEMBERED = 10_000
"""Checked folders that are remembered; a few hundred bytes each."""

_Signature = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    folder: Path
    digest: str
    tier: Tier
    """Where it was found: on disk or at the source."""


class AdapterStore(Protocol):
    """Where the loader gets an adapter's files from."""

    async def fetch(self, digest: str, source: SourceRef, max_bytes: int | None, *, namespace: str) -> StoredAdapter:
        """The folder with exactly this digest, fetched if it is not on disk with the rights of the namespace.

        Raises ArtifactError.
        """
        ...

    def pinned(self, digest: str) -> AbstractContextManager[None]:
        """Keeps the folder from being evicted while inside."""
        ...

    def on_disk(self, digest: str) -> bool: ...

    async def resolve(self, request: ResolveRequest) -> ResolveAnswer:
        """Inspects a source without loading it. A failure is part of the answer."""
        ...

    def give_credentials(self, credentials: NamespaceCredentials) -> None:
        """Replaces the namespaces' own credentials for sources."""
        ...


class DiskStore:
    def __init__(
        self,
        cache: DiskCache,
        base: BaseFacts,
        access: SourceAccess,
        *,
        max_rank: int,
        fetch_limits: FetchLimits,
    ) -> None:
        self._cache = cache
        self._base = base
        self._access = access
        self._max_rank = max_rank
        self._fetch_limits = fetch_limits
        self._inspectors = ThreadPoolExecutor(
            MAX_INSPECTIONS, thread_name_prefix="inspect-adapter", initializer=lower_thread_priority
        )
        self._inspected: dict[str, tuple[AdapterLimits, _Signature]] = {}

    async def fetch(self, digest: str, source: SourceRef, max_bytes: int | None, *, namespace: str) -> StoredAdapter:
        async with self._access.reading(namespace, source.uri) as sources:
            limit = max_bytes or sources.max_adapter_bytes
            folder, tier = self._cache.get(digest), Tier.DISK
            if folder is None:
                tier = Tier.SOURCE
                bounds = replace(self._fetch_limits, max_total_bytes=limit)
                resolved = await resolve(source.uri, source.revision, ArtifactKind.ADAPTER, bounds, sources)
                folder = await self._cache.obtain(resolved, digest)
        self._cache.touch(digest)
        limits = AdapterLimits(self._max_rank, limit, sources.max_tensors)
        await asyncio.get_running_loop().run_in_executor(
            self._inspectors, self._inspect, folder, digest, source.uri, limits
        )
        return StoredAdapter(folder, digest, tier)

    def _inspect(self, folder: Path, digest: str, uri: str, limits: AdapterLimits) -> None:
        """Raises ArtifactError if the folder has another digest or does not fit the base."""
        try:
            signature = _signature(folder)
        except OSError as error:
            raise ArtifactError(
                FailureReason.CORRUPT_ARTIFACT, f"The copy of {uri} on this machine cannot be read: {error.strerror}."
            ) from error
        if self._inspected.get(digest) == (limits, signature):
            return
        found = inspect_adapter_folder(folder, self._base, limits)
        if found.digest is not None and found.digest != digest:
            raise ArtifactError(
                FailureReason.DIGEST_MISMATCH,
                f"{uri} holds {found.digest}, not the requested {digest}; correct spec.source.digest "
                "or pin the revision.",
            )
        if not found.compatibility.ok:
            raise ArtifactError(found.compatibility.reason or FailureReason.INCOMPATIBLE, found.compatibility.message)
        if len(self._inspected) >= MAX_REMEMBERED:
            self._inspected.clear()
        self._inspected[digest] = (limits, signature)

    def give_credentials(self, credentials: NamespaceCredentials) -> None:
        self._access.give(credentials.namespaces)

    def pinned(self, digest: str) -> AbstractContextManager[None]:
        return self._cache.pinned(digest)

    def on_disk(self, digest: str) -> bool:
        return self._cache.get(digest) is not None

    async def resolve(self, request: ResolveRequest) -> ResolveAnswer:
        try:
            async with self._access.reading(request.namespace, request.source.uri) as sources:
                limit = request.max_bytes or sources.max_adapter_bytes
                found = await inspect_adapter(
                    request.source.uri,
                    request.source.revision,
                    request.digest,
                    self._base,
                    AdapterLimits(self._max_rank, max_bytes=limit),
                    sources,
                    fetch_limits=replace(self._fetch_limits, max_total_bytes=limit),
                )
        except ArtifactError as error:
            return ResolveAnswer(failure=ErrorDetail(reason=error.reason.value, message=error.message))
        failure = None
        if not found.compatibility.ok:
            reason = found.compatibility.reason or FailureReason.INCOMPATIBLE
            failure = ErrorDetail(reason=reason.value, message=found.compatibility.message)
        return ResolveAnswer(
            digest=found.digest,
            weights_digest=found.weights_digest,
            revision=found.revision,
            rank=found.rank,
            target_modules=list(found.target_modules),
            size_bytes=found.size_bytes,
            failure=failure,
        )


def _signature(folder: Path) -> _Signature:
    """Each file's name, inode, size, mtime and ctime; no program can set a ctime."""
    with os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return tuple(sorted((name, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns) for name, info in stats))
