"""`pvc://claim/path`: a folder of a volume mounted into this process.

Only runtimes have such mounts: the administrator's runtime profile mounts a claim at `<pvc_root>/<claim>`. A process
without them fails transiently, since a runtime can read the source. Links lead out of neither the claim nor the folder
of it that the namespace may read. A volume stores no revisions: the reported one
only detects changes, and the digest identifies the content.
"""

from __future__ import annotations

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.sources.folder import REVISION_PREFIX, FolderSource
from lorapool_artifacts.uri import PvcUri


def open_pvc(uri: PvcUri, revision: str | None, settings: SourceSettings, deadline: Deadline) -> FolderSource:
    """Opens the folder in its present state. Raises ArtifactError."""
    if settings.pvc_root is None:
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE, f"{uri} can only be read by a runtime that mounts the claim {uri.claim}."
        )
    if revision is not None and not revision.startswith(REVISION_PREFIX):
        raise ArtifactError(
            FailureReason.INVALID_SOURCE, f"{uri}: a volume stores no revisions; remove spec.source.revision."
        )
    if not (settings.pvc_root / uri.claim).is_dir():
        raise ArtifactError(
            FailureReason.CLAIM_NOT_MOUNTED,
            f"{uri}: the claim {uri.claim} is not mounted into the runtime; add it to runtimeProfiles.<name>.volumes "
            "of the chart, where <name> is spec.runtimeProfile of the BaseModel.",
        )
    parts = uri.path.split("/") if uri.path else []
    depth = len(settings.pvc_boundary.split("/")) if settings.pvc_boundary else 0
    return FolderSource.open(settings.pvc_root / uri.claim, parts, boundary=depth, where=str(uri), deadline=deadline)
