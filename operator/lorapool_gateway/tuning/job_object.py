"""The FineTuneJob object of a request, and the job of the API that an object is shown as. Pure."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.common import API_VERSION, GROUP
from lorapool_api.tuning.finetunejob import (
    ANNOTATION_METADATA,
    KIND,
    FineTuneJobSpec,
    PromotionPolicy,
)
from lorapool_api.tuning.finetunejob_status import FineTuneJobStatus
from lorapool_api.tuning.states import JobFailure, JobState, RunState
from lorapool_gateway.routing.objects import ObjectRef, unix_s
from lorapool_gateway.tuning.files import FileRecord
from lorapool_gateway.tuning.job_request import JobRequest

LABEL_REQUEST = f"{GROUP}/api-request"
"""On a FineTuneJob: hash of the key and the body of the call that created it."""
ANNOTATION_CALL = f"{GROUP}/api-call"
"""On a FineTuneJob: JSON with what the call named and the object's spec does not show, and when it arrived."""
_STATES = {
    JobState.VALIDATING: "validating_files",
    JobState.QUEUED: "queued",
    JobState.TRAINING: "running",
    JobState.EVALUATING: "running",
    JobState.PUBLISHING: "running",
    JobState.PAUSED: "paused",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
_OF_FILES = frozenset({"invalid_training_file", "invalid_n_examples"})


@dataclass(frozen=True, slots=True)
class Call:
    """What is kept of the call that created a job."""

    arrived_unix_s: float
    number: int
    """Counts the calls with the same key and body."""
    request: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A FineTuneJob with what its answers need."""

    ref: ObjectRef
    uid: str
    created_unix_s: float
    spec: FineTuneJobSpec
    status: FineTuneJobStatus
    metadata: Mapping[str, str]
    request_hash: str
    call: Call | None
    """None: it was not created by this API."""

    @property
    def id(self) -> str:
        return self.ref.name

    @property
    def state(self) -> JobState | None:
        """As the operator says; None before it has looked, and for a state of a newer operator."""
        try:
            return JobState(self.status.state) if self.status.state else None
        except ValueError:
            return None

    @property
    def ended(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.spec.run is RunState.CANCELLED or (self.state is not None and self.state.ended)

    @property
    def shown_state(self) -> str:
        """The status of the API: what the owner has asked for counts at once."""
        state = self.state
        if state is not None and state.ended:
            return _STATES[state]
        if self.spec.run is RunState.CANCELLED:
            return "cancelled"
        if self.spec.run is RunState.PAUSED:
            return "paused"
        return _STATES.get(state or JobState.VALIDATING, "queued")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a request's names lead to."""

    base: ObjectRef
    base_spec: BaseModelSpec
    init_from: str | None
    """Name of the LoraAdapter that is continued."""
    training: FileRecord
    validation: FileRecord | None


def request_hash(key_id: str, namespace: str, body: bytes) -> str:
    """Equal for calls of one key for one namespace with the same body: 40 hex digits."""
    return hashlib.sha256(b"\0".join((key_id.encode(), namespace.encode(), body))).hexdigest()[:40]


def job_name(hashed: str, number: int) -> str:
    """The id of the job of the n-th call with this hash, the same wherever and whenever it is computed."""
    digest = hashlib.sha256(f"{hashed}/{number}".encode()).digest()
    return "ftjob-" + base64.b32encode(digest).decode().lower()[:24]


def manifest(request: JobRequest, inputs: Inputs, namespace: str, hashed: str, call: Call) -> dict[str, Any]:
    """The object to create."""
    annotations = {
        ANNOTATION_CALL: json.dumps(
            {"arrived": call.arrived_unix_s, "number": call.number, "request": dict(call.request)}
        )
    }
    if request.metadata:
        annotations[ANNOTATION_METADATA] = json.dumps(request.metadata)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": job_name(hashed, call.number),
            "namespace": namespace,
            "labels": {LABEL_REQUEST: hashed},
            "annotations": annotations,
        },
        "spec": _spec(request, inputs, namespace),
    }


def kept_of(request: JobRequest) -> dict[str, Any]:
    """The members of a request that answers repeat."""
    return {
        "model": request.model,
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "hyperparameters": request.chosen.model_dump(),
    }


def _spec(request: JobRequest, inputs: Inputs, namespace: str) -> dict[str, Any]:
    extras = request.lorapool
    data = {
        "training": _file(namespace, inputs.training),
        "validation": None if inputs.validation is None else _file(namespace, inputs.validation),
        "validationFraction": extras.validation_fraction,
        "lossOn": extras.loss_on,
    }
    lora = {
        "rank": extras.rank,
        "alpha": extras.alpha,
        "dropout": extras.dropout,
        "targetModules": extras.target_modules,
    }
    measured = inputs.validation is not None or extras.validation_fraction is not None
    return _without_none(
        {
            "baseModelRef": {"name": inputs.base.name, "namespace": inputs.base.namespace},
            "initFrom": {"name": inputs.init_from} if inputs.init_from else None,
            "data": data,
            "lora": lora,
            "training": _training(request, inputs.base_spec),
            # Without examples to measure with there is no gate, and the model is made as OpenAI makes it.
            "promotion": {"policy": extras.promotion or (None if measured else PromotionPolicy.ALWAYS)},
            "output": {"suffix": request.suffix},
            "priority": extras.priority,
        }
    )


def _training(request: JobRequest, base: BaseModelSpec) -> dict[str, Any]:
    chosen, extras = request.chosen, request.lorapool
    rate = extras.learning_rate
    if rate is None and chosen.learning_rate_multiplier != "auto":
        default = Decimal(base.fine_tuning.defaults.learning_rate)
        rate = f"{Decimal(repr(chosen.learning_rate_multiplier)) * default:.6g}"
    return {
        "epochs": None if chosen.n_epochs == "auto" else chosen.n_epochs,
        "batchSize": None if chosen.batch_size == "auto" else chosen.batch_size,
        "learningRate": rate,
        "maxSteps": extras.max_steps,
        "maxTokens": extras.max_tokens,
        "schedule": extras.schedule,
        "warmup": extras.warmup,
        "weightDecay": extras.weight_decay,
        "numerics": extras.numerics,
        "seed": request.seed,
    }


def _file(namespace: str, record: FileRecord) -> dict[str, str]:
    return {"uri": f"store://{namespace}/files/{record.id}", "digest": f"sha256:{record.sha256}"}


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    """Without the members that are None, and without objects that are empty then."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        kept = _without_none(item) if isinstance(item, Mapping) else item
        if kept is not None and kept != {}:
            found[name] = kept
    return found


def parse_object(raw: Mapping[str, Any]) -> Job:
    """Parses a FineTuneJob. Raises ValueError."""
    metadata = raw["metadata"]
    annotations = metadata.get("annotations") or {}
    return Job(
        ref=ObjectRef(str(metadata["namespace"]), str(metadata["name"])),
        uid=str(metadata["uid"]),
        created_unix_s=unix_s(metadata.get("creationTimestamp")),
        spec=FineTuneJobSpec.model_validate(raw.get("spec") or {}),
        status=FineTuneJobStatus.model_validate(raw.get("status") or {}),
        metadata=_texts(annotations.get(ANNOTATION_METADATA)),
        request_hash=str((metadata.get("labels") or {}).get(LABEL_REQUEST, "")),
        call=_call(annotations.get(ANNOTATION_CALL)),
    )


def _texts(text: str | None) -> Mapping[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _call(text: str | None) -> Call | None:
    """The call that an annotation describes; None if it is none, since users may write it too."""
    try:
        found = json.loads(text or "null")
        request = found["request"]
        return Call(float(found["arrived"]), int(found["number"]), request) if isinstance(request, dict) else None
    except (ValueError, TypeError, KeyError, ValidationError):
        return None


def shown(job: Job, result_files: list[str]) -> dict[str, Any]:
    """The job object of the API."""
    state, status, call = job.shown_state, job.status, job.call.request if job.call else {}
    hyperparameters = _hyperparameters(job, call)
    finish = status.progress.estimated_finish if status.progress is not None and state == "running" else None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_unix_s),
        "error": _error(job) if state == "failed" else None,
        "estimated_finish": int(unix_s(finish)) if finish else None,
        "fine_tuned_model": status.result.model if status.result is not None and state == "succeeded" else None,
        "finished_at": int(unix_s(status.finished_at)) if status.finished_at and job.ended else None,
        "hyperparameters": hyperparameters,
        "integrations": [],
        "metadata": dict(job.metadata),
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "model": str(call.get("model") or job.spec.base_model_ref.name),
        "organization_id": job.ref.namespace,
        "result_files": result_files,
        "seed": job.spec.training.seed,
        "status": state,
        "trained_tokens": status.usage.trained_tokens if status.usage is not None and state == "succeeded" else None,
        "training_file": str(call.get("training_file") or job.spec.data.training.uri),
        "validation_file": _validation_file(job, call),
        "user_provided_suffix": job.spec.output.suffix,
    }


def _validation_file(job: Job, call: Mapping[str, Any]) -> str | None:
    given = call.get("validation_file")
    if isinstance(given, str):
        return given
    return job.spec.data.validation.uri if job.spec.data.validation is not None else None


def _hyperparameters(job: Job, call: Mapping[str, Any]) -> dict[str, Any]:
    """As the client sent them; where that was auto, the number in use once it is known."""
    given = call.get("hyperparameters")
    found = dict(given) if isinstance(given, dict) else {}
    resolved = job.status.resolved
    numbers = {"n_epochs": resolved.epochs, "batch_size": resolved.batch_size} if resolved is not None else {}
    for name in ("n_epochs", "batch_size", "learning_rate_multiplier"):
        if found.get(name, "auto") == "auto":
            found[name] = numbers.get(name) or "auto"
    return found


def _error(job: Job) -> dict[str, Any]:
    failure = job.status.failure
    if failure is None:
        return {"code": "server_error", "message": "The job failed.", "param": None}
    try:
        code = JobFailure(failure.reason).code
    except ValueError:  # a reason of a newer operator
        code = "server_error"
    return {"code": code, "message": failure.message, "param": "training_file" if code in _OF_FILES else None}
