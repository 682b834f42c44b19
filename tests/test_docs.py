"""The pages name only what exists: commands, files, links, fields, metrics, settings, reasons and chart values."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorapool_api.common import AdapterCondition, BaseCondition, FailureReason, Reason
from lorapool_api.crd import KINDS, crd
from lorapool_api.tuning.states import JobCondition, JobFailure, JobReason, JobState
from lorapool_runtime.settings import RuntimeSettings

ROOT = Path(__file__).resolve().parent.parent
REASONS = (Reason, FailureReason, AdapterCondition, BaseCondition, JobCondition, JobFailure, JobReason, JobState)
sys.path.append(str(ROOT / "hack"))

from reference.pages import PAGES as GENERATED  # noqa: E402  # found through the line above
from reference.pages import fields  # noqa: E402

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "hack").rglob("README.md"),
    ROOT / "charts" / "lorapool" / "README.md",
]
GUIDES = [
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "how-to").glob("*.md"),
    *(ROOT / "docs" / "explanation").glob("*.md"),
]
REFERENCE = ROOT / "docs" / "reference"
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))
VALUES: dict[str, Any] = yaml.safe_load((ROOT / "charts" / "lorapool" / "values.yaml").read_text())
CODE = [path for folder in ("crds", "operator", "runtime", "hack", "tests", "bench", "charts")
        for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".tpl", ".yaml")]  # fmt: skip
SOURCES = "\n".join(path.read_text() for path in [ROOT / "Makefile", *CODE] if path != Path(__file__))
FOLDERS = ("bench", "charts", "crds", "docs", "examples", "hack", "operator", "runtime", "tests")
KUBERNETES = {
    "job",
    "namespace",
    "secret",
    "configmap",
    "configmaps",
    "service",
    "pods",
    "pod",
    "nodes",
    "events",
    "crd",
    "deploy",
    "hpa",
    "leaderworkersets",
}

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
by_guide = pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page, without their indentation in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of the page's shell blocks and of its inline code. Heredocs are left out."""
    lines = []
    for block in blocks(page, "sh"):
        block = re.sub(r"<<YAML\n.*?^YAML$", "", block, flags=re.M | re.S)
        lines += re.sub(r"\\\n", " ", block).splitlines()
    lines += re.findall(r"`((?:kubectl|helm|make) [^`\n]+)`", page.read_text())
    for line in lines:
        for command in re.split(r"&&|\|", line):
            try:
                yield shlex.split(command, comments=True)
            except ValueError:  # a part of a quoted text
                continue


def manifests(page: Path) -> Iterator[dict[str, Any]]:
    texts = [*blocks(page, "yaml"), *re.findall(r"<<YAML\n(.*?)^YAML$", "\n".join(blocks(page, "sh")), re.M | re.S)]
    for text in texts:
        found = yaml.safe_load(text)
        if isinstance(found, dict) and str(found.get("apiVersion", "")).startswith("lorapool.dev/"):
            yield found


def fields_of(kind: str) -> set[str]:
    schema = next(crd(item) for item in KINDS if item.kind == kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return {path.replace("[]", "") for path, _, _ in fields(schema, {})}


def paths(value: Any, path: str = "") -> Iterator[str]:
    """The dotted path of every key of nested mappings and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}{key}"
            yield from paths(inner, f"{path}{key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from paths(inner, path)


ALL_FIELDS = set().union(*(fields_of(item.kind) for item in KINDS))
METRICS = set(re.findall(r"`(lorapool_\w+)`", GENERATED["metrics.md"]()))
SETTINGS = set(re.findall(r"LORAPOOL_\w+", GENERATED["settings.md"]()))


@pytest.mark.parametrize("name", GENERATED)
def test_a_reference_page_is_what_the_code_gives(name: str) -> None:
    assert (REFERENCE / name).read_text().endswith(GENERATED[name]()), "run `make generate`"


@by_page
def test_every_make_target_a_page_names_exists(page: Path) -> None:
    named = set()
    for command in re.findall(r"(?:^|`)make ([a-z][a-z -]*[a-z])", page.read_text(), re.M):
        named |= {word for word in command.split() if not word.startswith("-")}
    assert named - TARGETS == set()


@by_page
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", page.read_text())
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []


@by_page
def test_every_file_a_page_names_exists(page: Path) -> None:
    named = re.findall(rf"(?:^|[\s`\"])((?:{'|'.join(FOLDERS)})/[\w./*-]+)", page.read_text(), re.M)
    bases = (ROOT, page.parent, page.parent.parent)  # a README in hack/ may name files from hack/ on
    missing = {name for name in named if not any(list(base.glob(name.rstrip("./"))) for base in bases)}
    assert missing == set()


@by_page
def test_every_test_a_page_names_exists(page: Path) -> None:
    known = {
        f"{path.name}::{name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M)
    }
    assert set(re.findall(r"test_\w+\.py::test_\w+", page.read_text())) - known == set()


@by_page
def test_every_metric_a_page_names_is_exported(page: Path) -> None:
    packages = {"lorapool_operator", "lorapool_gateway", "lorapool_runtime"}
    named = set(re.findall(r"\b(lorapool_(?:operator|gateway|runtime)_[a-z0-9_]*[a-z0-9])\b", page.read_text()))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} - METRICS - packages == set()


@by_page
def test_every_setting_a_page_names_is_read(page: Path) -> None:
    named = set(re.findall(r"\bLORAPOOL_[A-Z0-9_]*[A-Z0-9]\b", page.read_text()))
    of_processes = {name for name in named if re.match(r"LORAPOOL_(OPERATOR|GATEWAY|RUNTIME)_", name)}
    assert of_processes - SETTINGS == set()
    assert {name for name in named - SETTINGS if name not in SOURCES} == set()


@by_guide
def test_every_flag_of_the_runtime_that_a_page_names_exists(page: Path) -> None:
    known = {f"--{name.replace('_', '-')}" for name in RuntimeSettings.model_fields} | {"--help"}
    named = set(re.findall(r"`(--[a-z][a-z-]+)`", page.read_text()))
    for command in commands(page):
        if "lorapool_runtime" in command:
            named |= {word for word in command if word.startswith("--")}
    assert named - known == set()


@by_guide
def test_every_reason_and_condition_a_page_names_exists(page: Path) -> None:
    known = {str(item) for names in REASONS for item in names}
    known |= set(re.findall(r"- alert: (\w+)", (ROOT / "charts/lorapool/rules/alerts.yaml").read_text()))
    named = re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)*)`", page.read_text())
    named += re.findall(r"--for=condition=(\w+)", page.read_text())
    assert set(named) - known - {kind.kind for kind in KINDS} - {"Allow", "Engine", "Secret", "Established"} == set()


@by_guide
def test_every_field_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"\b((?:spec|status)(?:\.[a-zA-Z]+)+)", page.read_text()))
    assert named - ALL_FIELDS == set()


@by_guide
def test_every_manifest_of_a_page_has_only_fields_that_exist_and_is_valid(page: Path) -> None:
    for manifest in manifests(page):
        kind = next(kind for kind in KINDS if kind.kind == manifest["kind"])
        named = set(paths({"spec": manifest["spec"]}))
        assert named - fields_of(kind.kind) == set()
        kind.spec.model_validate(manifest["spec"])


@by_page
def test_every_kubectl_command_names_a_resource_that_exists(page: Path) -> None:
    known = KUBERNETES | {name for kind in KINDS for name in (kind.short, kind.plural, kind.kind.lower())}
    named = set()
    for command in commands(page):
        if command[:1] == ["kubectl"] and len(command) > 2:
            named |= set(resources(command[1:]))
    assert named - known == set()


def resources(words: list[str]) -> list[str]:
    """The resources after the verb of a kubectl command; none for verbs that take files or names of pods."""
    plain, skip = [], False
    for word in words:
        if not skip and not word.startswith("-"):
            plain.append(word)
        skip = word in ("-n", "--namespace", "-l", "-f", "-o", "-p")
    verb, *rest = [*plain, ""]
    if verb == "create" or verb not in (
        "get",
        "describe",
        "delete",
        "annotate",
        "label",
        "wait",
        "scale",
        "logs",
        "explain",
    ):
        rest = rest[:1] if verb == "create" else []
    return [name.partition("/")[0].partition(".")[0] for name in rest[0].split(",")] if rest and rest[0] else []


@by_page
def test_every_chart_value_a_page_names_exists(page: Path) -> None:
    named = set()
    for command in commands(page):
        if command[:1] == ["helm"]:
            given = [command[at + 1] for at, word in enumerate(command[:-1]) if word in ("--set", "--set-string")]
            named |= {item.partition("=")[0] for item in given}
    sections = "|".join(VALUES)
    named |= set(re.findall(rf"`((?:{sections})(?:\.[a-zA-Z]+)+)(?:=[^`]*)?`", page.read_text()))
    assert {name for name in named if not has_value(name)} == set()


def has_value(name: str) -> bool:
    """Whether values.yaml has this key; an empty map takes any key."""
    at: Any = VALUES
    for part in name.split("."):
        if at == {}:
            return True
        if not isinstance(at, dict) or part not in at:
            return False
        at = at[part]
    return True


def test_the_values_of_the_gpu_guide_are_values_of_the_chart() -> None:
    given = yaml.safe_load(blocks(ROOT / "docs" / "how-to" / "install-on-a-gpu-cluster.md", "yaml")[0])
    assert set(given) <= set(VALUES)
    schema = yaml.safe_load((ROOT / "charts" / "lorapool" / "values.schema.json").read_text())
    assert given["image"].keys() <= schema["properties"]["image"]["properties"].keys()


def test_every_guide_is_linked_from_the_index() -> None:
    links = re.findall(r"\]\(([^)#:\s]+)\)", (ROOT / "docs" / "index.md").read_text())
    linked = {(ROOT / "docs" / link).resolve() for link in links}
    written = {
        path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "decisions" and path.name != "index.md"
    }
    assert written - linked == set()


def test_no_placeholder_is_left_in_a_page() -> None:
    assert [str(page) for page in PAGES if re.search(r"@[A-Z]{4,}@", page.read_text())] == []
