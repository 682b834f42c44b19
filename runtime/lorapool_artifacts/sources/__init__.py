"""Opens the source of a URI. There is one module per scheme, imported when it is first needed."""

from __future__ import annotations

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.sources.base import Source, download, read_range
from lorapool_artifacts.uri import ArtifactUri, HfUri, OciUri, S3Uri, StoreUri, is_revision

__all__ = ["Source", "download", "open_source", "read_range"]


def open_source(uri: ArtifactUri, revision: str | None, settings: SourceSettings, deadline: Deadline) -> Source:
    """Opens the source at `revision`, else at the URI's own revision, else at the newest.

    Blocks. Raises ArtifactError.
    """
    settings = settings.current()
    if revision is not None and not is_revision(revision):
        raise ArtifactError(
            FailureReason.INVALID_SOURCE, f"{uri}: {revision[:80]!r} is not a branch, tag, commit or digest."
        )
    if isinstance(uri, HfUri):
        from lorapool_artifacts.sources.hf import open_hf

        return open_hf(uri, revision, settings, deadline)
    if isinstance(uri, OciUri):
        from lorapool_artifacts.sources.oci import open_oci

        return open_oci(uri, revision, settings, deadline)
    if isinstance(uri, S3Uri):
        from lorapool_artifacts.sources.s3 import open_s3

        return open_s3(uri, revision, settings, deadline)
    if isinstance(uri, StoreUri):
        from lorapool_artifacts.sources.store import open_store

        return open_store(uri, revision, settings, deadline)
    from lorapool_artifacts.sources.pvc import open_pvc

    return open_pvc(uri, revision, settings, deadline)
