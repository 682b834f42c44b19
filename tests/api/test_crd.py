import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from lorapool_api.__main__ import TARGETS, rendered, to_yaml
from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.crd import KINDS, crd, structural

ROOT = Path(__file__).resolve().parents[2]
MODELS = [model for kind in KINDS for model in (kind.spec, kind.status)]


@pytest.mark.parametrize("folder", TARGETS, ids=str)
def test_the_committed_crds_are_what_the_models_generate(folder: Path) -> None:
    committed = {path.name: path.read_text() for path in (ROOT / folder).glob("*.yaml")}
    assert committed == rendered(), "run `make generate`"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_the_yaml_reads_back_as_the_crd(kind: object) -> None:
    value = crd(kind)  # type: ignore[arg-type]
    assert yaml.safe_load(to_yaml(value)) == json.loads(json.dumps(value))


def _nodes(schema: dict[str, object]):  # type: ignore[no-untyped-def]
    yield schema
    for child in schema.get("properties", {}).values():  # type: ignore[attr-defined]
        yield from _nodes(child)
    if "items" in schema:
        yield from _nodes(schema["items"])  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
def test_every_string_and_list_is_bounded(model: type[BaseModel]) -> None:
    for node in _nodes(structural(model)):
        if node["type"] == "array":
            assert "maxItems" in node, node
        if node["type"] == "string" and "enum" not in node:
            assert "maxLength" in node or "pattern" in node or node.get("format") == "date-time", node


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_documented(model: type[BaseModel]) -> None:
    fields = [item for node in _nodes(structural(model)) for item in node.get("properties", {}).items()]
    assert [name for name, field in fields if not field.get("description")] == []


def test_a_construct_without_a_structural_form_is_refused() -> None:
    class Odd(BaseModel):
        either: int | str

    with pytest.raises(ValueError, match=r"Odd\.either"):
        structural(Odd)


def test_an_object_of_a_newer_version_is_read_without_its_new_fields() -> None:
    spec = BaseModelSpec.model_validate({"source": {"uri": "hf://a/b"}, "fromTheFuture": 1})
    assert spec.scaling.min_replicas == 0
    assert "fromTheFuture" not in spec.dump()
