"""The gateway's settings: one frozen model, read once in `__main__` from LORAPOOL_GATEWAY_* and passed down.

An unknown LORAPOOL_GATEWAY_* name is an error, so that a typo in a manifest is seen at start. Names that
Kubernetes injects for a Service called "lorapool-gateway" (…_SERVICE_HOST, …_PORT=tcp://…) are no settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lorapool_api.basemodel import Namespace

PREFIX = "LORAPOOL_GATEWAY_"
ALL_NAMESPACES = "*"
MASTER_TOKEN_MIN_CHARS = 32

_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP)(_[A-Z]+)?$")


class SettingsError(Exception):
    """The environment cannot be used; the message names the variable."""


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespaces: frozenset[Namespace] | None = None
    """Namespaces whose objects are watched: a comma list, or "*" (None) for the whole cluster."""
    keys_namespace: Namespace
    """Namespace of the API key Secrets; no default, since a wrong guess would read someone else's Secrets."""
    master_token_file: Path = Path("/etc/lorapool/master/token")
    """File with the release's master token, from which each base's runtime token is derived."""
    kubeconfig: Path | None = None
    """Only outside a cluster; inside, the pod's service account is used."""

    listen_host: str = "0.0.0.0"
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes a free port (tests)."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9090

    max_body_bytes: Annotated[int, Field(ge=1024, le=64 * 2**20)] = 4 * 2**20
    """A longer request body is refused with 413."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Time for a client to send its body; a slow sender may not keep a handler."""
    max_requests: Annotated[int, Field(ge=1)] = 4096
    """Requests under way in this process, held ones included; bounds memory to max_requests bodies."""

    connect_timeout_s: Annotated[float, Field(gt=0)] = 1.0
    """TCP connect to a runtime: pods are near, so longer means gone."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A runtime that sends no byte for this long is given up. OpenAI's client waits as long."""
    write_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A client that takes nothing of its stream for this long is dropped, and its generation ended."""
    shutdown_delay_s: Annotated[float, Field(ge=0)] = 5.0
    """After SIGTERM: still accepting but not ready, so that load balancers drop this pod first."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 120.0
    """After that delay: time for requests under way."""
    max_tracked_adapters: Annotated[int, Field(ge=0)] = 500
    """Adapters with metric series of their own; the rest share one label value."""
    log_level: Annotated[str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$")] = "INFO"

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names:
            raise ValueError('needs a comma list of namespaces or "*"')
        return None if names == [ALL_NAMESPACES] else frozenset(names)


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings of this process. Raises SettingsError naming the variable."""
    known = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields}
    values: dict[str, str] = {}
    for key, text in environ.items():
        if not key.startswith(PREFIX) or _is_service_link(key, text):
            continue
        if key not in known:
            raise SettingsError(f"unknown setting {key}; known: {', '.join(sorted(known))}")
        if text != "":
            values[known[key]] = text
    try:
        return Settings.model_validate(values)
    except ValueError as error:
        raise SettingsError(f"bad {PREFIX}* settings: {error}") from error


def read_master_token(path: Path) -> str:
    """The master token without surrounding white space. Raises SettingsError, which never shows the content."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the master token from {path}: {type(error).__name__}") from error
    if len(token) < MASTER_TOKEN_MIN_CHARS:
        raise SettingsError(f"the master token in {path} is shorter than {MASTER_TOKEN_MIN_CHARS} characters")
    return token


def _is_service_link(key: str, text: str) -> bool:
    return _SERVICE_LINK.search(key) is not None or (key.endswith("_PORT") and "://" in text)
