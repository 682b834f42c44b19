"""values.yaml, its schema and the README agree."""

from __future__ import annotations

import itertools
import json
import string
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chart_kit
import jsonschema  # type: ignore[import-untyped]  # no stubs among the locked packages
import yaml
from chart_kit import CHART, default_values, documented_values, value_at

from lorapool_api.currency import is_currency

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value and here not in documented_values():
            yield from leaves(value, here)
        else:
            yield here


def test_every_value_is_explained_by_a_comment() -> None:
    assert [path for path in leaves(default_values()) if path not in documented_values()] == []


def test_the_readmes_table_is_the_generated_one() -> None:
    readme = (CHART / "README.md").read_text()

    assert chart_kit.readme_with_table(readme) == readme, "run: python tests/support/chart_kit.py"
    for path in documented_values():
        assert f"| `{path}` |" in readme


def test_the_defaults_fit_the_schema_and_the_schema_is_sound() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(default_values())


def test_the_schema_has_the_currencies_that_the_processes_know() -> None:
    codes = ["".join(letters) for letters in itertools.product(string.ascii_uppercase, repeat=3)]
    known = [code for code in codes if is_currency(code)]
    assert sorted(SCHEMA["$defs"]["currency"]["enum"]) == known
    money = jsonschema.Draft202012Validator(SCHEMA["$defs"]["money"])
    assert [code for code in codes if money.is_valid(f"25.50 {code}")] == known


def test_every_value_is_in_the_schema_and_the_schema_has_no_other() -> None:
    def known(schema: dict[str, Any], path: str = "") -> Iterator[str]:
        while "$ref" in schema:
            schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
        if "properties" not in schema or path in documented_values():
            yield path
            return
        for name, part in schema["properties"].items():
            yield from known(part, f"{path}.{name}" if path else name)

    assert sorted(known(SCHEMA)) == sorted(leaves(default_values()))


def test_every_value_is_read_by_a_template() -> None:
    templates = " ".join(file.read_text() for file in (CHART / "templates").rglob("*") if file.is_file())
    unread = {path for path in leaves(default_values()) if f".{path.rpartition('.')[2]}" not in templates}

    assert unread == {"global"}


def test_a_packaged_chart_has_all_it_renders_and_no_tests(tmp_path: Path) -> None:
    result = chart_kit.run("helm", "package", CHART, "--destination", tmp_path)
    assert result.returncode == 0, result.stderr
    [package] = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        names = {name.removeprefix("lorapool/") for name in archive.getnames()}

    assert not {name for name in names if name.endswith("_test.yaml")}
    assert names >= {
        "rules/alerts.yaml",
        "dashboards/fleet.json",
        "files/helm_test.py",
        "README.md",
        "values.schema.json",
    }
    assert {name for name in names if name.startswith("files/crds/")}
    assert chart_kit.run("helm", "template", "lorapool", package).returncode == 0


def test_no_object_of_the_schema_takes_unknown_keys_silently() -> None:
    def objects(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if "properties" in schema and isinstance(schema["properties"], dict) and "type" in schema:
                yield schema
            for part in schema.values():
                yield from objects(part)
        elif isinstance(schema, list):
            for part in schema:
                yield from objects(part)

    found = list(objects(SCHEMA))
    assert len(found) > 20
    for schema in found:
        assert schema["additionalProperties"] is False, list(schema["properties"])


def test_the_chart_names_the_kinds_it_installs_and_has_the_packages_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    listed = yaml.safe_load(chart["annotations"]["artifacthub.io/crds"])
    files = [yaml.safe_load(file.read_text()) for file in sorted((CHART / "files" / "crds").glob("*.yaml"))]
    project = (chart_kit.REPOSITORY / "pyproject.toml").read_text()

    assert [entry["name"] for entry in listed] == [crd["metadata"]["name"] for crd in files]
    assert [entry["kind"] for entry in listed] == [crd["spec"]["names"]["kind"] for crd in files]
    assert f'version = "{chart["appVersion"]}"' in project
    assert "dependencies" not in chart
    assert value_at(default_values(), "image.control.tag") == ""
