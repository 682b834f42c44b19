"""Turns the pydantic models into structural CRD schemas (apiextensions.k8s.io/v1).

A structural schema has no `$ref`, `const`, `anyOf: null`, `additionalProperties: false` or `title`. The output of
pydantic 2 is rewritten, and unknown constructs are refused, so that no new kind of field is lost silently. Source:
Kubernetes documentation, "Specifying a structural schema".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel as PydanticModel

from lorapool_api import basemodel, loraadapter
from lorapool_api.common import GROUP, VERSION
from lorapool_api.tuning import finetunejob
from lorapool_api.tuning.finetunejob_status import FineTuneJobStatus

Schema = dict[str, Any]

_KEPT = (
    "type",
    "description",
    "default",
    "enum",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "required",
    "x-kubernetes-validations",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)


def structural(model: type[PydanticModel]) -> Schema:
    """The structural schema of a model. Raises ValueError for a construct that it cannot express."""
    raw = model.model_json_schema(mode="validation", by_alias=True)
    return _convert(raw, raw.get("$defs", {}), path=model.__name__)


def _convert(node: Schema, defs: dict[str, Schema], path: str) -> Schema:
    node = dict(node)
    if "$ref" in node:
        target = defs[node.pop("$ref").removeprefix("#/$defs/")]
        node = {**target, **node}
    if "anyOf" in node:
        options = [option for option in node.pop("anyOf") if option != {"type": "null"}]
        if len(options) != 1:
            raise ValueError(f"{path}: a union of {len(options)} types has no structural schema")
        # An absent field, not a null one, stands for None.
        return _convert(
            {**options[0], **{k: v for k, v in node.items() if not (k == "default" and v is None)}}, defs, path
        )
    if "const" in node:
        node["enum"] = [node.pop("const")]

    result: Schema = {key: node[key] for key in _KEPT if key in node}
    unknown = node.keys() - set(_KEPT) - {"title", "$defs", "properties", "items", "additionalProperties"}
    if unknown:
        raise ValueError(f"{path}: no structural schema for {sorted(unknown)}")
    if "properties" in node:
        required = node.get("required", [])
        result["properties"] = {
            name: _with_factory_default(child, _convert(child, defs, f"{path}.{name}"), name in required)
            for name, child in node["properties"].items()
        }
    if "items" in node:
        result["items"] = _convert(node["items"], defs, f"{path}[]")
    if "description" in result:
        result["description"] = " ".join(str(result["description"]).split())
    if result.get("type") == "integer":
        result["format"] = "int64"
    if path.endswith(".conditions"):
        result["x-kubernetes-list-type"] = "map"
        result["x-kubernetes-list-map-keys"] = ["type"]
    return result


def _with_factory_default(raw: Schema, converted: Schema, required: bool) -> Schema:
    """Adds the default of a field with a `default_factory`, which pydantic's schema omits."""
    if not required and "default" not in raw:
        if converted.get("type") == "array":
            converted["default"] = []
        elif converted.get("type") == "object":
            # Nested defaults are written out: rules are checked on the default before nested defaults are applied.
            fields = converted.get("properties", {})
            converted["default"] = {key: child["default"] for key, child in fields.items() if "default" in child}
    return converted


@dataclass(frozen=True)
class Kind:
    """Everything that a CRD is generated from."""

    kind: str
    plural: str
    short: str
    name_max: int
    spec: type[PydanticModel]
    status: type[PydanticModel]
    description: str
    columns: tuple[tuple[str, str, str, int], ...]
    """Printer columns: (name, type, jsonPath, priority)."""
    selectable: tuple[str, ...]
    """Fields for `kubectl --field-selector`, from Kubernetes 1.31 on; older API servers ignore them."""
    scale: bool


EMPTY_STATUS = (
    "If the status stays empty, no operator watches this namespace: an administrator adds it to the chart's value "
    "watchNamespaces, or starts the operator."
)

KINDS = (
    Kind(
        kind=basemodel.KIND,
        plural=basemodel.PLURAL,
        short="bm",
        name_max=basemodel.NAME_MAX,
        spec=basemodel.BaseModelSpec,
        status=basemodel.BaseModelStatus,
        description="A base model, served by replicas that all of its LoraAdapters share.",
        columns=(
            ("READY", "string", '.status.conditions[?(@.type=="Ready")].status', 0),
            ("STATE", "string", ".status.state", 0),
            ("REPLICAS", "integer", ".status.replicas", 0),
            ("ADAPTERS", "integer", ".status.adapters.total", 0),
            ("LOADED", "integer", ".status.adapters.loaded", 0),
            ("LAST-USED", "date", ".status.lastUsed", 0),
            ("AGE", "date", ".metadata.creationTimestamp", 0),
            ("SOURCE", "string", ".spec.source.uri", 1),
            ("DIGEST", "string", ".status.digest", 1),
        ),
        selectable=(".spec.source.uri", ".status.state"),
        scale=True,
    ),
    Kind(
        kind=loraadapter.KIND,
        plural=loraadapter.PLURAL,
        short="lora",
        name_max=loraadapter.NAME_MAX,
        spec=loraadapter.LoraAdapterSpec,
        status=loraadapter.LoraAdapterStatus,
        description="A fine-tune: a LoRA adapter of a BaseModel, loaded by its first request and unloaded when idle.",
        columns=(
            ("BASE", "string", ".spec.baseModelRef.name", 0),
            ("READY", "string", '.status.conditions[?(@.type=="Ready")].status', 0),
            ("STATE", "string", ".status.state", 0),
            ("LOADED", "string", ".status.loaded", 0),
            ("LAST-USED", "date", ".status.lastUsed", 0),
            ("AGE", "date", ".metadata.creationTimestamp", 0),
            ("SOURCE", "string", ".spec.source.uri", 1),
            ("RANK", "integer", ".status.rank", 1),
            ("SIZE", "integer", ".status.sizeBytes", 1),
            ("DIGEST", "string", ".status.digest", 1),
        ),
        selectable=(".spec.baseModelRef.name", ".spec.source.uri", ".status.state"),
        scale=True,
    ),
    Kind(
        kind=finetunejob.KIND,
        plural=finetunejob.PLURAL,
        short="ftj",
        name_max=finetunejob.NAME_MAX,
        spec=finetunejob.FineTuneJobSpec,
        status=FineTuneJobStatus,
        description="A fine-tuning job: an adapter of a BaseModel that is trained together with the base's other jobs.",
        columns=(
            ("BASE", "string", ".spec.baseModelRef.name", 0),
            ("STATE", "string", ".status.state", 0),
            ("PROGRESS", "string", ".status.progress.steps", 0),
            ("LOSS", "number", ".status.metrics.trainLoss", 0),
            ("VALID", "number", ".status.metrics.validLoss", 0),
            ("MODEL", "string", ".status.result.model", 0),
            ("AGE", "date", ".metadata.creationTimestamp", 0),
            ("DATA", "string", ".spec.data.training.uri", 1),
            ("REASON", "string", ".status.failure.reason", 1),
        ),
        selectable=(".spec.baseModelRef.name", ".status.state"),
        scale=False,
    ),
)


def crd(kind: Kind) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind."""
    status = structural(kind.status)
    subresources: dict[str, Any] = {"status": {}}
    if kind.scale:
        subresources["scale"] = _scale(kind)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": [kind.short],
                "categories": ["lorapool"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [_column(*column) for column in kind.columns],
                    "selectableFields": [{"jsonPath": path} for path in kind.selectable],
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "description": f"{kind.description} {EMPTY_STATUS}",
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object"},
                                "spec": structural(kind.spec),
                                "status": status,
                            },
                            "x-kubernetes-validations": [
                                {
                                    "rule": f"size(self.metadata.name) <= {kind.name_max}",
                                    "message": f"metadata.name must be at most {kind.name_max} characters",
                                },
                                {
                                    "rule": "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                                    "message": "metadata.name must be one DNS label without dots: it is a model name",
                                },
                            ],
                        }
                    },
                }
            ],
        },
    }


def _scale(kind: Kind) -> dict[str, str]:
    if kind.plural == basemodel.PLURAL:
        return {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {"specReplicasPath": ".spec.minReplicas", "statusReplicasPath": ".status.loadedReplicas"}


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    if priority:
        column["priority"] = priority
    return column
