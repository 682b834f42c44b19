"""Settings of every process: one frozen model each, read once at start from flags, the environment and defaults.

A field is read from the process's prefix and the field's name (LORAPOOL_GATEWAY_API_PORT), or from the names that its
`Env` gives. Any other LORAPOOL_ variable is an error, so that a typing error in a manifest stops the process instead
of being ignored. An empty variable counts as unset. No message shows the value of a variable.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lorapool_api.basemodel import Namespace
from lorapool_api.logs import LogFormat

PROJECT_PREFIX = "LORAPOOL_"
ALL_NAMESPACES = "*"

TOOL_VARIABLES = frozenset(
    {
        "LORAPOOL_BENCH_BASE",
        "LORAPOOL_CACHE",
        "LORAPOOL_CLUSTERS",
        "LORAPOOL_DEBIAN_MIRROR",
        "LORAPOOL_DEMO_BASE",
        "LORAPOOL_E2E_KEEP",
        "LORAPOOL_E2E_SUMMARY",
        "LORAPOOL_LM_EVAL",
        "LORAPOOL_SCREENSHOTS",
        "LORAPOOL_TEST_ADAPTERS",
        "LORAPOOL_TEST_BASE",
        "LORAPOOL_TEST_ENGINE",
        "LORAPOOL_TEST_THREADS",
        "LORAPOOL_WITNESS_AWAY_S",
        "LORAPOOL_WITNESS_REQUESTS",
    }
)
"""Variables of the repository's tools and tests, which a developer's shell exports. Processes ignore them."""

_Path = tuple[str, ...]
"""Names of nested fields, outermost first."""


class SettingsError(Exception):
    """The settings cannot be used. `lines` holds one sentence per mistake, each naming its variable or file."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines

    def report(self, program: str) -> None:
        """Writes the mistakes to standard error, one per line."""
        for line in self.lines:
            print(f"{program}: {line}", file=sys.stderr)


class Env:
    """Names the environment variables of a field, in place of prefix and field name. The first that is set wins.

    A field with an empty `Env()` is not read from the environment.
    """

    def __init__(self, *names: str) -> None:
        self.names = names


class SettingsGroup(BaseModel):
    """A frozen group of settings: unknown fields are refused, and each field's docstring is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class ProcessSettings(SettingsGroup):
    """All settings of one process, and those that every process has."""

    prefix: ClassVar[str]
    """Prefix of this process's variables."""
    has_flags: ClassVar[bool] = False
    """Whether each setting is also a command line flag, so that errors name the flag too."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """INFO logs starts, loads and failures, and nothing per request."""
    log_format: LogFormat = "auto"
    """json: one JSON object per line; text: for people; auto: text on a terminal, else json."""
    metrics_tls_dir: Path | None = None
    """Folder with tls.crt and tls.key, with which metrics and their port's probes are served. None: plain HTTP."""
    metrics_token_file: Path | None = None
    """File with the bearer token that /metrics on the metrics port requires. None: none is required."""


class ServingSettings(ProcessSettings):
    """What gateway and runtime have in common, whose event loops serve requests."""

    loop_stuck_s: Annotated[float, Field(gt=0)] = 30.0
    """The probes fail when the process' event loop has not run for this long. They are answered from a thread of their
    own: a loop that is busy for less delays them no more than any other thread does."""


G = TypeVar("G", bound=SettingsGroup)
P = TypeVar("P", bound=ProcessSettings)


def read(model: type[P], environ: Mapping[str, str], flags: Mapping[str, object] | None = None) -> P:
    """Settings of a process; flags win over the environment, which wins over the defaults.

    Raises SettingsError with one line per mistake.
    """
    names = variables(model, model.prefix)
    return _validated(model, names, environ, flags or {}, list(_unknown(environ, names.values())), model.has_flags)


def read_group(group: type[G], environ: Mapping[str, str]) -> G:
    """One group alone, for a command line tool; other LORAPOOL_ variables are ignored. Raises SettingsError."""
    return _validated(group, variables(group, ""), environ, {}, [], has_flags=False)


def _validated(
    model: type[G],
    names: Mapping[_Path, tuple[str, ...]],
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    mistakes: list[str],
    has_flags: bool,
) -> G:
    try:
        settings = model.model_validate(values_of(names, environ) | dict(flags))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            if item["type"] == "default_factory_not_called":  # follows from another field's mistake
                continue
            mistakes.append(_sentence(item["loc"], item["type"], item["msg"], names, environ, has_flags))
    if mistakes:
        raise SettingsError(*mistakes) from None
    return settings


def variables(model: type[BaseModel], prefix: str) -> dict[_Path, tuple[str, ...]]:
    """The environment variables of each field, nested groups included, in the order in which they are looked up."""
    found: dict[_Path, tuple[str, ...]] = {}
    for name, field in model.model_fields.items():
        group = field.annotation
        given = next((item.names for item in field.metadata if isinstance(item, Env)), None)
        if isinstance(group, type) and issubclass(group, BaseModel):
            found |= {(name, *path): names for path, names in variables(group, prefix).items()}
        elif given != ():
            found[(name,)] = given or (prefix + name.upper(),)
    return found


def values_of(names: Mapping[_Path, tuple[str, ...]], environ: Mapping[str, str]) -> dict[str, Any]:
    """The variables that are set and not empty, nested like the model's fields."""
    values: dict[str, Any] = {}
    for path, candidates in names.items():
        if key := _set_one(candidates, environ):
            group = values
            for part in path[:-1]:
                group = group.setdefault(part, {})
            group[path[-1]] = environ[key]
    return values


def _set_one(candidates: Iterable[str], environ: Mapping[str, str]) -> str | None:
    return next((key for key in candidates if environ.get(key)), None)


def _unknown(environ: Mapping[str, str], names: Iterable[tuple[str, ...]]) -> Iterator[str]:
    known = {key for candidates in names for key in candidates if key.startswith(PROJECT_PREFIX)}
    for key in sorted(environ.keys() - known - TOOL_VARIABLES):
        if key.startswith(PROJECT_PREFIX):
            nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
            yield f"unknown setting {key} in the environment; did you mean {nearest}?"


def _sentence(
    loc: tuple[int | str, ...],
    kind: str,
    message: str,
    names: Mapping[_Path, tuple[str, ...]],
    environ: Mapping[str, str],
    has_flags: bool,
) -> str:
    what = "is required and has no default" if kind == "missing" else message.removeprefix("Value error, ")
    path = next((path for path in names if path == loc[: len(path)]), None)
    if path is None:
        return what
    variable = _set_one(names[path], environ) or names[path][0]
    flag = f" (--{path[0].replace('_', '-')})" if has_flags and len(path) == 1 else ""
    return f"{variable}{flag}: {what}"


def _namespace_list(value: object) -> object:
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise ValueError(f'needs a comma-separated list of namespaces or "{ALL_NAMESPACES}"')
    return None if names == [ALL_NAMESPACES] else frozenset(names)


Namespaces = Annotated[frozenset[Namespace] | None, BeforeValidator(_namespace_list)]
"""A comma-separated list of namespaces; None, written "*", stands for the whole cluster."""
