"""One reader for the settings of all processes."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lorapool_api.settings import (
    TOOL_VARIABLES,
    ProcessSettings,
    SettingsError,
    SettingsGroup,
    variables,
)
from lorapool_gateway import settings as gateway
from lorapool_operator import settings as operator
from lorapool_runtime import settings as runtime

ROOT = Path(__file__).resolve().parents[2]

Read = Callable[[Mapping[str, str]], ProcessSettings]


def read_runtime(environ: Mapping[str, str]) -> ProcessSettings:
    return runtime.read_settings([], environ)


PROCESSES: dict[str, tuple[Read, dict[str, str]]] = {
    "GATEWAY": (gateway.read_settings, {"LORAPOOL_GATEWAY_KEYS_NAMESPACE": "keys"}),
    "OPERATOR": (
        operator.read_settings,
        {
            "LORAPOOL_OPERATOR_OWN_NAMESPACE": "lorapool",
            "LORAPOOL_OPERATOR_RUNTIME_IMAGE": "runtime:1",
            "LORAPOOL_OPERATOR_PROFILES_FILE": "/profiles.yaml",
        },
    ),
    "RUNTIME": (read_runtime, {"LORAPOOL_RUNTIME_MODEL": "hf://acme/base"}),
}
each_process = pytest.mark.parametrize("name", PROCESSES)
MODELS: list[type[ProcessSettings]] = [gateway.Settings, operator.Settings, runtime.RuntimeSettings]


def refused(name: str, changes: dict[str, str]) -> tuple[str, ...]:
    read, needed = PROCESSES[name]
    with pytest.raises(SettingsError) as caught:
        read({**needed, **changes})
    return caught.value.lines


@each_process
def test_a_process_reads_its_settings_from_the_environment_and_ignores_other_variables(name: str) -> None:
    read, needed = PROCESSES[name]
    port = f"LORAPOOL_{name}_METRICS_PORT"
    settings = read({**needed, port: "9999", f"LORAPOOL_{name}_LOG_LEVEL": "", "PATH": "/bin", "LORAPOOL_CACHE": "/c"})
    assert getattr(settings, "metrics_port") == 9999  # noqa: B009  every process has one, their base class has none
    assert settings.log_level == "INFO", "an empty variable is unset"


@each_process
def test_an_unknown_setting_is_refused_with_the_nearest_known_name(name: str) -> None:
    assert refused(name, {f"LORAPOOL_{name}_METRIC_PORT": "9999"}) == (
        f"unknown setting LORAPOOL_{name}_METRIC_PORT in the environment; did you mean LORAPOOL_{name}_METRICS_PORT?",
    )


@each_process
@pytest.mark.parametrize(
    "key", ["PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8080_TCP", "PORT_8080_TCP_ADDR"]
)
def test_a_variable_of_a_kubernetes_service_is_no_exception(name: str, key: str) -> None:
    (line,) = refused(name, {f"LORAPOOL_{name}_{key}": "tcp://10.0.0.1:8080"})
    assert line.startswith(f"unknown setting LORAPOOL_{name}_{key} ")
    assert "10.0.0.1" not in line


@each_process
@pytest.mark.parametrize("key", ["LORAPOOL_TOKENSHA256", "LORAPOOL_OCI_PASSWRD", "LORAPOOL_SOMETHING"])
def test_a_project_variable_without_a_process_is_refused_unless_it_is_read(name: str, key: str) -> None:
    (line,) = refused(name, {key: "secret-value"})
    assert line.startswith(f"unknown setting {key} ")
    assert "secret-value" not in line


def test_what_only_the_runtime_reads_is_refused_by_the_others() -> None:
    shared = {"LORAPOOL_TOKEN_SHA256": "a" * 64, "LORAPOOL_NATIVE": "avx2"}
    settings = runtime.read_settings(["--model", "x"], shared)
    assert (settings.token_sha256, settings.native) == ("a" * 64, "avx2")
    assert len(refused("GATEWAY", shared)) == len(refused("OPERATOR", shared)) == 2


@pytest.mark.parametrize("name", ["OPERATOR", "RUNTIME"])
def test_source_settings_belong_to_the_processes_that_read_artifacts(name: str) -> None:
    environ = {
        "LORAPOOL_OCI_INSECURE_HOSTS": "One:5000, two",
        "HF_ENDPOINT": "http://hub/",
        "AWS_ENDPOINT_URL": "http://generic",
        "AWS_ENDPOINT_URL_S3": "http://s3",
        "AWS_SKIP_SIGNATURE": "true",
    }
    read, needed = PROCESSES[name]
    settings = read({**needed, **environ})
    assert isinstance(settings, (operator.Settings, runtime.RuntimeSettings))
    sources = settings.sources
    assert sources.oci_insecure_hosts == {"one:5000", "two"}
    assert (sources.hf_endpoint, sources.s3_endpoint, sources.s3_anonymous) == ("http://hub", "http://s3", True)
    (line,) = refused("GATEWAY", environ)
    assert line.startswith("unknown setting LORAPOOL_OCI_INSECURE_HOSTS ")


def test_every_mistake_has_a_line_that_names_the_variable_as_it_was_set() -> None:
    lines = refused(
        "OPERATOR",
        {
            "LORAPOOL_OPERATOR_WORKERS": "0",
            "LORAPOOL_OPERATOR_RUNTIME_IMAGE": "",
            "LORAPOOL_OPERATOR_NAMESPACES": "Bad_Name",
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "perhaps",
            "LORAPOOL_OPERATOR_RESYNC": "1",
        },
    )
    assert sorted(line.split(":")[0] for line in lines) == [
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
        "LORAPOOL_OPERATOR_NAMESPACES",
        "LORAPOOL_OPERATOR_RUNTIME_IMAGE",
        "LORAPOOL_OPERATOR_WORKERS",
        "unknown setting LORAPOOL_OPERATOR_RESYNC in the environment; did you mean LORAPOOL_OPERATOR_RESYNC_S?",
    ]
    assert "LORAPOOL_OPERATOR_RUNTIME_IMAGE: is required and has no default" in lines
    assert not any("perhaps" in line or "Bad_Name" in line for line in lines)


def test_an_error_of_the_runtime_names_variable_and_flag() -> None:
    assert refused("RUNTIME", {"LORAPOOL_RUNTIME_MODEL": ""}) == (
        "LORAPOOL_RUNTIME_MODEL (--model): is required and has no default",
    )


def test_secrets_are_neither_in_the_repr_nor_flags(capsys: pytest.CaptureFixture[str]) -> None:
    secrets = {"HF_TOKEN": "s3cr3t-1", "AWS_SECRET_ACCESS_KEY": "s3cr3t-2", "LORAPOOL_OCI_PASSWORD": "s3cr3t-3"}
    assert "s3cr3t" not in repr(runtime.read_settings(["--model", "x"], secrets))
    with pytest.raises(SystemExit):
        runtime.read_settings(["--help"], {})
    assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.prefix)
def test_every_setting_is_documented(model: type[SettingsGroup]) -> None:
    def undocumented(group: type[SettingsGroup]) -> list[str]:
        names = [name for name, field in group.model_fields.items() if not field.description]
        for field in group.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, SettingsGroup):
                names += undocumented(field.annotation)
        return names

    assert undocumented(model) == []


@pytest.mark.parametrize("program", ["lorapool_gateway", "lorapool_operator", "lorapool_runtime"])
def test_a_process_with_bad_settings_ends_with_2_and_one_line_per_mistake(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = program.upper()
    for key in [key for key in os.environ if key.startswith("LORAPOOL_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv(f"{prefix}_METRIC_PORT", "1")
    monkeypatch.setenv(f"{prefix}_LOG_LEVEL", "LOUD")
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as ended:
        sys.exit(importlib.import_module(f"{program}.__main__").main())
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, lines
    assert all(line.startswith(f"{program.replace('_', '-')}: ") for line in lines)
    assert sum(f"{prefix}_METRICS_PORT" in line for line in lines) == 1
    assert sum(f"{prefix}_LOG_LEVEL" in line for line in lines) == 1


def test_variables_that_tools_read_are_known_to_every_process() -> None:
    """A developer's shell and the Makefile export them, and processes started from there must not refuse them."""
    read = {
        name
        for folder in ("hack", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"environ(?:\.get\(|\[)\s*\"(LORAPOOL_[A-Z0-9_]+)\"", path.read_text())
    } | set(re.findall(r"export (LORAPOOL_[A-Z0-9_]+)", (ROOT / "Makefile").read_text()))
    of_processes = {key for model in MODELS for keys in variables(model, model.prefix).values() for key in keys}
    assert read - of_processes == TOOL_VARIABLES
