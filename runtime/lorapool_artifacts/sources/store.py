"""`store://namespace/key`: a folder of the release's own store.

A namespace may read its own objects only: the rules say so (`policy`), and the token that the operator makes for it
covers no others. The store lists no SHA-256, so the revision is a hash of names, sizes and ETags, as with a bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from lorapool_api.common import FailureReason
from lorapool_api.store_protocol import StoreAccess
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.sources.store_client import StoreClient
from lorapool_artifacts.uri import StoreUri

REVISION_PREFIX = "etag-"


class StoreSource:
    """The objects below one folder, as listed when the source was opened."""

    def __init__(self, uri: StoreUri, client: StoreClient) -> None:
        self.where = str(uri)
        self._uri = uri
        self._client = client
        self._folder = f"{uri.key}/" if uri.key else ""
        found = client.list(uri.namespace, self._folder)
        self._objects = {item.key.removeprefix(self._folder): item for item in found}
        lines = (f"{name}\0{item.size}\0{item.etag}\n" for name, item in sorted(self._objects.items()))
        self.revision = f"{REVISION_PREFIX}{hashlib.sha256(''.join(lines).encode()).hexdigest()[:32]}"

    def list_files(self) -> Sequence[RemoteFile]:
        if not self._objects:
            raise ArtifactError(FailureReason.SOURCE_NOT_FOUND, f"{self.where} holds no objects; check the source.")
        return [RemoteFile(name, item.size) for name, item in self._objects.items()]

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        item = self._objects[name]
        end = item.size if length is None else min(item.size, start + length)
        if start >= end:
            return
        yield from self._client.stream(self._uri.namespace, item.key, start, end - start, etag=item.etag)

    def close(self) -> None:
        self._client.close()


def open_store(uri: StoreUri, revision: str | None, settings: SourceSettings, deadline: Deadline) -> StoreSource:
    """Lists the folder. Raises ArtifactError."""
    if revision is not None and not revision.startswith(REVISION_PREFIX):
        raise ArtifactError(
            FailureReason.INVALID_SOURCE,
            f"{uri}: the store has no named revisions; remove spec.source.revision and give spec.source.digest.",
        )
    if not settings.store_url:
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE,
            f"{uri}: no store is known here; enable it with the chart's store.enabled. It is retried.",
        )
    access = StoreAccess(url=settings.store_url, token=settings.store_token or "", ca=settings.store_ca or "")
    return StoreSource(uri, StoreClient(access, deadline))
