"""The objects of all namespaces in one storage, over obstore: a folder, or a bucket of S3, Google Cloud or Azure.

A write is atomic: an object appears complete, and an upload that breaks off leaves nothing. An object's expiry is a
small object of its own, below a prefix that no caller can name, and is found again after a restart.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import LocalStore, from_url

from lorapool_api.store_protocol import StoredObject, StoreListing, StoreUsage
from lorapool_store.errors import exists, not_found, over_quota, too_large

CHUNK_BYTES = 256 * 1024
PART_BYTES = 5 * 1024 * 1024
"""Parts of an upload that are written at once; the smallest that S3 takes."""
_EXPIRY = "_expiry"
"""No namespace can have this name."""
_STAGED = re.compile(r"#\d+$")
"""End of the names of files that obstore is writing. No key can have it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the objects may have, in bytes."""

    max_object_bytes: int
    quota_bytes: int
    """Of one namespace."""


@dataclass(slots=True)
class _Upload:
    """Counts and hashes the bytes of one upload while they pass."""

    bytes: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)


@dataclass(frozen=True, slots=True)
class Reading:
    """An object, or a part of one, that is being read."""

    size: int
    """Bytes of the whole object."""
    etag: str
    modified_unix_s: float
    start: int
    end: int
    """Behind the last byte."""
    result: Any

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes from `start` to `end`."""
        async for chunk in self.result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)


class Objects:
    """All methods may raise StoreError."""

    def __init__(self, location: str, bounds: Bounds) -> None:
        """Creates the folder of a file:/// location and removes what killed writers left there."""
        self._bounds = bounds
        self._folder = Path(location.removeprefix("file://")) if location.startswith("file://") else None
        self._used: Counter[str] = Counter()
        """Bytes by namespace, of those that were counted."""
        self._uploads: Counter[str] = Counter()
        if self._folder is None:
            self._store: Any = from_url(location)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_staged(self._folder)
            self._store = LocalStore(self._folder, automatic_cleanup=True)

    async def put(
        self,
        namespace: str,
        key: str,
        body: AsyncIterator[bytes],
        *,
        create: bool = False,
        expires_unix_s: int | None = None,
    ) -> StoredObject:
        """Stores all bytes of `body`. `create`: raises when the object exists already."""
        path, upload = f"{namespace}/{key}", _Upload()
        if create and await self._head(path) is not None:
            raise exists()
        await self._count(namespace)
        self._uploads[namespace] += 1
        try:
            if expires_unix_s is not None:
                await obstore.put_async(self._store, _expiry_path(expires_unix_s, path), b"-")
            replaced = await self._head(path)
            result = await self._write(path, self._counted(namespace, body, upload), create=create)
            self._used[namespace] -= replaced["size"] if replaced is not None else 0
        except BaseException:
            self._used[namespace] -= upload.bytes
            raise
        finally:
            self._uploads[namespace] -= 1
        self._sync(path)
        return StoredObject(
            key=key, size=upload.bytes, etag=str(result["e_tag"] or ""), sha256=upload.sha256.hexdigest()
        )

    async def _write(self, path: str, body: AsyncIterator[bytes], *, create: bool) -> Any:
        """obstore writes parts to a hidden place and makes them visible at the end. With `create` it checks once more
        that the object is new, for which it takes the whole body at once."""
        if not create:
            return await obstore.put_async(self._store, path, body, chunk_size=PART_BYTES, max_concurrency=2)
        whole = b"".join([chunk async for chunk in body])
        try:
            return await obstore.put_async(self._store, path, whole, mode="create")
        except AlreadyExistsError as error:
            raise exists() from error

    async def _counted(self, namespace: str, body: AsyncIterator[bytes], upload: _Upload) -> AsyncIterator[bytes]:
        async for chunk in body:
            upload.bytes += len(chunk)
            self._used[namespace] += len(chunk)
            if upload.bytes > self._bounds.max_object_bytes:
                raise too_large(self._bounds.max_object_bytes)
            if self._used[namespace] > self._bounds.quota_bytes:
                raise over_quota(namespace, self._bounds.quota_bytes)
            upload.sha256.update(chunk)
            yield chunk

    async def get(
        self, namespace: str, key: str, *, start: int = 0, end: int | None = None, etag: str | None = None
    ) -> Reading:
        """Opens an object from byte `start` to before `end`. `etag`: raises if it is another one by now."""
        path = f"{namespace}/{key}"
        meta = await self._head(path)
        if meta is None:
            raise not_found()
        size = int(meta["size"])
        last = size if end is None else min(end, size)
        options: dict[str, Any] = {"if_match": etag} if etag else {}
        if (start, last) != (0, size) and start < last:
            options["range"] = (start, last)
        try:
            result = await obstore.get_async(self._store, path, options=options)
        except FileNotFoundError as error:
            raise not_found() from error
        except PreconditionError as error:
            raise exists() from error
        found = result.meta
        return Reading(size, str(found["e_tag"] or ""), found["last_modified"].timestamp(), start, last, result)

    async def head(self, namespace: str, key: str) -> StoredObject:
        """What a listing says of one object."""
        meta = await self._head(f"{namespace}/{key}")
        if meta is None:
            raise not_found()
        return _listed(namespace, meta)

    async def delete(self, namespace: str, key: str) -> None:
        """Deletes an object, or all below a key that ends in a slash or is empty. It need not exist."""
        if key and not key.endswith("/"):
            await self._delete(namespace, f"{namespace}/{key}")
            return
        for meta in await self._all(f"{namespace}/{key}"):
            await self._delete(namespace, meta["path"])

    async def listing(self, namespace: str, prefix: str, *, after: str = "", limit: int = 1000) -> StoreListing:
        """The objects below a prefix that ends in a slash or is empty, sorted by key."""
        found = sorted((_listed(namespace, meta) for meta in await self._all(f"{namespace}/{prefix}")), key=_key)
        rest = [item for item in found if item.key > after]
        return StoreListing(objects=rest[:limit], has_more=len(rest) > limit)

    async def usage(self, namespace: str) -> StoreUsage:
        """Bytes of a namespace, and how many it may have."""
        await self._count(namespace)
        return StoreUsage(bytes=self._used[namespace], quota_bytes=self._bounds.quota_bytes)

    @property
    def counted(self) -> dict[str, int]:
        """Bytes of the namespaces that were used since the last sweep."""
        return dict(self._used)

    async def sweep(self, now_unix_s: float) -> int:
        """Deletes what has expired, and returns how many objects that was. Namespaces are counted again later."""
        due = [meta["path"] for meta in await self._all(f"{_EXPIRY}/") if _expires_unix_s(meta["path"]) <= now_unix_s]
        for path in due:
            name = path.split("/", 2)[2]
            await self._delete(name.partition("/")[0], name)
            await self._remove(path)
        for namespace in [name for name in self._used if not self._uploads[name]]:
            del self._used[namespace]
        return len(due)

    async def _delete(self, namespace: str, path: str) -> None:
        meta = await self._head(path)
        if meta is not None and await self._remove(path) and namespace in self._used:
            self._used[namespace] -= int(meta["size"])

    async def _remove(self, path: str) -> bool:
        """Returns whether it was there; stores of buckets do not tell, and count as if it was."""
        try:
            await obstore.delete_async(self._store, path)
        except FileNotFoundError:
            return False
        return True

    async def _count(self, namespace: str) -> None:
        if namespace not in self._used:
            total = sum(int(meta["size"]) for meta in await self._all(f"{namespace}/"))
            if namespace not in self._used:
                self._used[namespace] = total

    async def _all(self, prefix: str) -> list[Any]:
        """Listings of a folder hide the files that are being written."""
        return [meta async for page in obstore.list(self._store, prefix) for meta in page]

    async def _head(self, path: str) -> Any:
        try:
            return await obstore.head_async(self._store, path)
        except FileNotFoundError:
            return None

    def _sync(self, path: str) -> None:
        """Writes a file of a folder, and its name, through to the disk. It may be gone again by now."""
        if self._folder is None:
            return
        file = self._folder / path
        for target, flags in ((file, os.O_RDONLY), (file.parent, os.O_RDONLY | os.O_DIRECTORY)):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(target, flags)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def _remove_staged(folder: Path) -> None:
    for path in folder.rglob("*#*"):
        if _STAGED.search(path.name):
            path.unlink(missing_ok=True)


def _listed(namespace: str, meta: Any) -> StoredObject:
    return StoredObject(
        key=meta["path"].removeprefix(f"{namespace}/"),
        size=int(meta["size"]),
        etag=str(meta["e_tag"] or ""),
        modified_unix_s=meta["last_modified"].timestamp(),
    )


def _key(item: StoredObject) -> str:
    return item.key


def _expiry_path(unix_s: int, path: str) -> str:
    return f"{_EXPIRY}/{unix_s:012d}/{path}"


def _expires_unix_s(path: str) -> int:
    return int(path.split("/", 2)[1])
