"""Files and fine-tuning jobs in the OpenAPI document: the request as its parser reads it, answers as OpenAI's."""

from __future__ import annotations

from typing import Any

from lorapool_gateway.tuning.job_request import JobRequest
from lorapool_gateway.tuning.routes import ROUTE_FILES, ROUTE_JOBS
from lorapool_gateway.tuning.upload import MAX_EXPIRY_S, MAX_FILE_BYTES, MIN_EXPIRY_S

Schema = dict[str, Any]
_TEMPLATE = "#/components/schemas/{model}"
_ORGANIZATION: Schema = {
    "name": "OpenAI-Organization",
    "in": "header",
    "schema": {"type": "string"},
    "description": "The namespace to act for, one of the key's. Default: the key's default namespace, or its only one.",
}
_ID: Schema = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[A-Za-z0-9-]+$"}}


def _query(name: str, schema: Schema, what: str) -> Schema:
    return {"name": name, "in": "query", "schema": schema, "description": what}


_AFTER = _query("after", {"type": "string"}, "The id behind which the page begins.")


def _limit(most: int) -> Schema:
    return _query("limit", {"type": "integer", "minimum": 1, "maximum": most}, "Items of a page.")


_UPLOAD: Schema = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {
        "purpose": {"const": "fine-tune"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S},
        "file": {
            "type": "string",
            "format": "binary",
            "description": f"At most {MAX_FILE_BYTES} bytes of JSON lines. Must come after `expires_after`.",
        },
    },
}


def _object(kind: str, *required: str) -> Schema:
    return {"type": "object", "required": ["id", "object", *required], "properties": {"object": {"const": kind}}}


FILE = _object("file", "bytes", "created_at", "filename", "purpose", "status")
JOB = _object("fine_tuning.job", "created_at", "model", "organization_id", "status", "training_file", "hyperparameters")
EVENT = _object("fine_tuning.job.event", "created_at", "level", "message", "type")
CHECKPOINT = _object(
    "fine_tuning.job.checkpoint", "created_at", "fine_tuned_model_checkpoint", "metrics", "step_number"
)


def _deleted(kind: str) -> Schema:
    return _object(kind, "deleted")


def _listed(item: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["object", "data", "has_more"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": item}},
    }


def schemas() -> dict[str, Schema]:
    """The named parts of the request for a job."""
    found: dict[str, Schema] = JobRequest.model_json_schema(ref_template=_TEMPLATE).get("$defs", {})
    return found


def paths(errors: dict[str, Schema]) -> dict[str, Schema]:
    """The operations by path; each may be answered with any of the errors."""

    def operation(name: str, answer: Schema, *parameters: Schema, body: Schema | None = None) -> Schema:
        content = {"application/octet-stream": {}} if answer == {} else {"application/json": {"schema": answer}}
        made = {
            "operationId": name,
            "parameters": [_ORGANIZATION, *parameters],
            "responses": {"200": {"description": "Done.", "content": content}, **errors},
        }
        return made if body is None else {**made, "requestBody": {"required": True, "content": body}}

    job = JobRequest.model_json_schema(ref_template=_TEMPLATE)
    job.pop("$defs", None)
    order, purpose = (
        _query("order", {"enum": ["asc", "desc"]}, "By time of creation."),
        _query("purpose", {}, "Only these."),
    )
    found = {
        ROUTE_FILES: {
            "get": operation("listFiles", _listed(FILE), _AFTER, _limit(10_000), order, purpose),
            "post": operation("uploadFile", FILE, body={"multipart/form-data": {"schema": _UPLOAD}}),
        },
        ROUTE_FILES + "/{id}": {
            "get": operation("getFile", FILE, _ID),
            "delete": operation("deleteFile", _deleted("file"), _ID),
        },
        ROUTE_FILES + "/{id}/content": {"get": operation("downloadFile", {}, _ID)},
        ROUTE_JOBS: {
            "get": operation("listJobs", _listed(JOB), _AFTER, _limit(100)),
            "post": operation("createJob", JOB, body={"application/json": {"schema": job}}),
        },
        ROUTE_JOBS + "/{id}": {"get": operation("getJob", JOB, _ID)},
        ROUTE_JOBS + "/{id}/events": {"get": operation("listEvents", _listed(EVENT), _ID, _AFTER, _limit(1000))},
        ROUTE_JOBS + "/{id}/checkpoints": {
            "get": operation("listCheckpoints", _listed(CHECKPOINT), _ID, _AFTER, _limit(1000))
        },
    }
    for what in ("cancel", "pause", "resume"):
        found[f"{ROUTE_JOBS}/{{id}}/{what}"] = {"post": operation(f"{what}Job", JOB, _ID)}
    return found


def deletes_model(errors: dict[str, Schema], model_name: Schema) -> Schema:
    """`DELETE /v1/models/{model}`."""
    return {
        "operationId": "deleteModel",
        "summary": "Deletes a model that a fine-tuning job has made, with its files.",
        "parameters": [_ORGANIZATION, model_name],
        "responses": {
            "200": {"description": "Done.", "content": {"application/json": {"schema": _deleted("model")}}},
            **errors,
        },
    }
