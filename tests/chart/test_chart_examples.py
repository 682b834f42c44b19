"""The example objects are valid for the CRDs' schema, the models and the gateway's parser of keys."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # no stubs among the locked packages
import pytest
import yaml
from chart_kit import CHART, REPOSITORY

from lorapool_api import basemodel, common, loraadapter
from lorapool_gateway.routing import auth

EXAMPLES = REPOSITORY / "examples"
SPECS: dict[str, type[common.ApiModel]] = {
    basemodel.KIND: basemodel.BaseModelSpec,
    loraadapter.KIND: loraadapter.LoraAdapterSpec,
}


def schema_of(kind: str) -> dict[str, Any]:
    for file in (REPOSITORY / "crds").glob("*.yaml"):
        crd = yaml.safe_load(file.read_text())
        if crd["spec"]["names"]["kind"] == kind:
            [version] = crd["spec"]["versions"]
            schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
            return schema
    raise LookupError(kind)


def strict(schema: Any) -> Any:
    """The schema under the API server's strict field validation, which refuses unknown fields."""
    if isinstance(schema, dict):
        result = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and schema.get("type") == "object":
            result["additionalProperties"] = False
        return result
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


def objects() -> list[dict[str, Any]]:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    found = [yaml.safe_load((EXAMPLES / name).read_text()) for name in ("basemodel.yaml", "loraadapter.yaml")]
    return found + list(yaml.safe_load(chart["annotations"]["artifacthub.io/crdsExamples"]))


@pytest.mark.parametrize("example", objects(), ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_an_example_fits_its_crd_to_the_last_field(example: dict[str, Any]) -> None:
    schema = strict(schema_of(example["kind"]))
    schema["properties"]["metadata"] = {"type": "object"}

    jsonschema.Draft202012Validator(schema).validate(example)
    assert example["apiVersion"] == common.API_VERSION
    spec = SPECS[example["kind"]].model_validate(example["spec"])
    given = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert given == example["spec"], "the models read every field of it"


def test_the_example_adapter_refers_to_the_example_base() -> None:
    base, adapter = (yaml.safe_load((EXAMPLES / f"{kind}.yaml").read_text()) for kind in ("basemodel", "loraadapter"))

    assert adapter["spec"]["baseModelRef"] == {"name": base["metadata"]["name"]}


def test_the_key_example_is_read_by_the_gateway_and_opens_nothing() -> None:
    secret = yaml.safe_load((EXAMPLES / "apikey.yaml").read_text())
    data = {name: base64.b64encode(value.encode()).decode() for name, value in secret["stringData"].items()}

    key = auth.parse_key({"metadata": secret["metadata"], "data": data})

    assert secret["metadata"]["labels"] == {common.LABEL_API_KEY: "true"}
    assert set(secret["stringData"]) == auth.FIELDS & {"keySha256", "namespaces", "owner", "maxInFlight"}
    assert key.max_in_flight == 32
    assert secret["stringData"]["keySha256"] == "0" * 64


@pytest.mark.parametrize(
    "path", [*sorted(EXAMPLES.glob("*.yaml")), CHART / "templates" / "NOTES.txt"], ids=lambda p: p.name
)
def test_no_example_holds_a_real_key(path: Path) -> None:
    text = path.read_text()

    assert not re.search(r"\blp-[A-Za-z0-9_-]{20,}", text)
    assert hashlib.sha256(b"").hexdigest() not in text
