"""`pvc://claim/path`: a folder of a volume mounted into this process.

Used by runtimes only: the admin's runtime profile mounts a claim at `<pvc_root>/<claim>`. A process without
such mounts says so, transiently: another one can read it. A volume keeps no revisions: the one that is
reported tells changes apart, and the digest decides.
"""

from __future__ import annotations

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.sources.folder import REVISION_PREFIX, FolderSource
from lorapool_artifacts.uri import PvcUri


def open_pvc(uri: PvcUri, revision: str | None, settings: SourceSettings, deadline: Deadline) -> FolderSource:
    """The folder as it is now. Raises ArtifactError."""
    if settings.pvc_root is None:
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE, f"{uri} can only be read by a runtime that mounts the claim {uri.claim}."
        )
    if revision is not None and not revision.startswith(REVISION_PREFIX):
        raise ArtifactError(
            FailureReason.INVALID_SOURCE, f"{uri}: a volume keeps no revisions; remove spec.source.revision."
        )
    parts = [uri.claim, *uri.path.split("/")] if uri.path else [uri.claim]
    return FolderSource.open(settings.pvc_root, parts, where=str(uri), deadline=deadline)
