"""What is done about FineTuneJobs while fine-tuning is off: those that are deleted may go."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lorapool_api.tuning.finetunejob import FINALIZER, KIND
from lorapool_operator.effects.cluster import Cluster, ClusterError
from lorapool_operator.effects.tuning import FilesError, JobFiles, is_served
from lorapool_operator.world.cluster_cache import AdapterObject, Key, Meta, ObjectKind

log = logging.getLogger(__name__)


async def release_deleted_jobs(
    cluster: Cluster, namespaces: Iterable[str | None], files: JobFiles | None, adapters: Iterable[AdapterObject]
) -> None:
    """Deletes the files of deleted jobs, if there is a store, and removes the finalizer that earlier plans have set.

    What is refused is logged and left to the next call: nothing else of the operator depends on this.
    """
    for namespace in namespaces:
        try:
            async for page in cluster.pages(KIND, namespace, metadata_only=True):
                for raw in page.items:
                    finalizers = raw["metadata"].get("finalizers") or ()
                    if "deletionTimestamp" in raw["metadata"] and FINALIZER in finalizers:
                        await _release(cluster, Meta.parse(raw["metadata"]), finalizers, files, adapters)
        except (ClusterError, FilesError) as error:
            log.info("deleted jobs not released", extra={"watched_namespace": namespace or "", "error": str(error)})


async def _release(
    cluster: Cluster,
    job: Meta,
    finalizers: Iterable[str],
    files: JobFiles | None,
    adapters: Iterable[AdapterObject],
) -> None:
    if files is not None:
        await files.delete(job, keep_result=is_served(job, adapters))
    kept = [name for name in finalizers if name != FINALIZER]
    await cluster.set_finalizers(Key(ObjectKind.TUNING, job.namespace, job.name), job.resource_version, kept)
