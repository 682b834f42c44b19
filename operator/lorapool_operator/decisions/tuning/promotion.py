"""Whether a trained adapter becomes a model, and the LoraAdapter that it then is."""

from __future__ import annotations

import json

from lorapool_api.common import API_VERSION, FIELD_MANAGER, LABEL_MANAGED_BY
from lorapool_api.loraadapter import KIND
from lorapool_api.tuning.finetunejob import ANNOTATION_JOB, ANNOTATION_LINEAGE, Promotion, PromotionPolicy, model_alias
from lorapool_api.tuning.finetunejob_status import MetricsStatus
from lorapool_api.tuning.states import JobFailure
from lorapool_api.tuning.trainer_protocol import JobReport, JobResult, TrainerSnapshot
from lorapool_operator.decisions.pods import Manifest
from lorapool_operator.decisions.tuning.values import Failure
from lorapool_operator.world.tuning import ObservedJob, TuningObject


def gate(promotion: Promotion, metrics: MetricsStatus | None) -> Failure | None:
    """Returns why the result does not become a model; None if it passes, or if no gate is asked for.

    The base's own loss is that of step 0, at which the adapter adds nothing.
    """
    if promotion.policy is not PromotionPolicy.GATED:
        return None
    valid = metrics.valid_loss if metrics is not None else None
    base = metrics.base_valid_loss if metrics is not None else None
    if valid is None or base is None:
        return Failure(JobFailure.GATE_NOT_MET, "Nothing was measured, so that the gate of spec.promotion is not met.")
    if not valid < base - float(promotion.min_improvement):
        message = (
            f"The validation loss is {valid:.4f}, the base's own {base:.4f}: it is not lower by more than "
            f"{promotion.min_improvement} (promotion.minImprovement). No model was made."
        )
        return Failure(JobFailure.GATE_NOT_MET, message)
    if promotion.max_valid_loss is not None and valid > float(promotion.max_valid_loss):
        message = f"The validation loss is {valid:.4f}, above {promotion.max_valid_loss} (promotion.maxValidLoss)."
        return Failure(JobFailure.GATE_NOT_MET, f"{message} No model was made.")
    return None


def adapter_name(job: TuningObject) -> str:
    """Returns the name of the LoraAdapter that the job makes."""
    return job.spec.output.adapter_name or job.meta.name


def alias_of(job: TuningObject) -> str:
    """Returns the model name of the job's result."""
    return model_alias(
        base=job.spec.base_model_ref.name,
        namespace=job.meta.namespace,
        suffix=job.spec.output.suffix,
        job_uid=job.meta.uid,
    )


def is_result(observed: ObservedJob, result: JobResult) -> bool:
    """True if the LoraAdapter with the name of the result is this job's."""
    source = observed.result.spec.source if observed.result is not None else None
    return source is not None and (source.uri, source.digest) == (result.uri, result.digest)


def lora_adapter(job: TuningObject, report: JobReport, result: JobResult, trainer: TrainerSnapshot) -> Manifest:
    """Returns the LoraAdapter of a result. It has no owner: it outlives its job, and costs nothing while idle."""
    reference = job.spec.base_model_ref.model_copy(update={"namespace": job.base_key.namespace})
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": adapter_name(job),
            "namespace": job.meta.namespace,
            "labels": {LABEL_MANAGED_BY: FIELD_MANAGER},
            "annotations": {
                ANNOTATION_JOB: f"{job.key}@{job.meta.uid}",
                ANNOTATION_LINEAGE: json.dumps(_lineage(job, report, trainer), sort_keys=True),
            },
        },
        "spec": {
            "baseModelRef": reference.dump(),
            "source": {"uri": result.uri, "digest": result.digest},
            "alias": alias_of(job),
        },
    }


def _lineage(job: TuningObject, report: JobReport, trainer: TrainerSnapshot) -> Manifest:
    """Returns everything that is needed to train the same adapter again."""
    data, resolved, initial = report.data, report.resolved, job.status.initial
    return {
        "baseDigest": trainer.base.digest if trainer.base is not None else None,
        "dataDigest": data.digest if data is not None else None,
        "validationDigest": data.validation_digest if data is not None else None,
        "initialDigest": initial.digest if initial is not None else None,
        "settings": resolved.dump() if resolved is not None else None,
        "trainer": trainer.trainer_version,
        "device": trainer.base.device if trainer.base is not None else None,
        "metrics": report.metrics.dump() if report.metrics is not None else None,
    }
