"""The operator's settings: one frozen model, read once in `__main__` from LORAPOOL_OPERATOR_* and passed down.

An unknown LORAPOOL_OPERATOR_* name is an error, so that a typo in a manifest is seen at start. Names that
Kubernetes injects for a Service called "lorapool-operator" are no settings. Credentials of artifact sources
(HF_TOKEN, AWS_*, ...) are read by `lorapool_artifacts`, not here.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lorapool_api.basemodel import Namespace

PREFIX = "LORAPOOL_OPERATOR_"
ALL_NAMESPACES = "*"
MASTER_TOKEN_MIN_CHARS = 32

_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT$|_PORT_\d+_(TCP|UDP)(_[A-Z]+)?$")

PositiveS = Annotated[float, Field(gt=0)]


class SettingsError(Exception):
    """The environment cannot be used; the message names the variable."""


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespaces: frozenset[Namespace] | None = None
    """Namespaces whose objects are watched: a comma list, or "*" (None) for the whole cluster."""
    own_namespace: Namespace
    """Where the Lease lives; no default, since two releases must not share one by accident."""
    identity: str = Field(default_factory=socket.gethostname, min_length=1, max_length=253)
    """Holder of the Lease: the pod's name."""
    kubeconfig: Path | None = None
    """Only outside a cluster; inside, the pod's service account is used."""

    leader_election: bool = True
    """Off only in tests with one process."""
    lease_name: str = Field(default="lorapool-operator", pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    lease_duration_s: Annotated[int, Field(ge=2)] = 15  # whole seconds in the Lease itself
    """A standby takes over this long after the leader's last renewal."""
    lease_renew_deadline_s: PositiveS = 10.0
    """A leader that could not renew for this long stops acting, well before the standby starts."""
    lease_retry_s: PositiveS = 2.0

    runtime_image: str = Field(min_length=1)
    """Image of runtime pods whose profile names none."""
    runtime_image_pull_policy: str = Field(default="IfNotPresent", pattern="^(Always|IfNotPresent|Never)$")
    profiles_file: Path
    """YAML file of runtime profiles; looked at again on each resync."""
    master_token_file: Path = Path("/etc/lorapool/master/token")
    """File with the release's master token, from which each base's runtime token is derived."""

    metrics_host: str = "0.0.0.0"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    """/metrics, /healthz, /readyz; 0 takes a free port (tests)."""
    max_tracked_adapters: Annotated[int, Field(ge=0)] = 2000
    """Adapters with a metric series of their own; the rest is only counted."""

    resync_s: PositiveS = 45.0
    """Everything is looked at again this often: bounds what a lost watch event can cost."""
    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """Keys reconciled at one time; each is mostly waiting for the API server."""
    judge_concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Sources inspected at one time."""
    judge_timeout_s: PositiveS = 120.0
    """One inspection may take this long; then it is a SourceTimeout and tried again."""
    pending_status_s: PositiveS = 5.0
    """A judgement that runs longer than this shows in the status; a quicker one costs no extra write."""
    retry_min_s: PositiveS = 5.0
    """First wait after a transient failure; doubles each time, with jitter."""
    retry_max_s: PositiveS = 300.0
    usage_interval_s: PositiveS = 60.0
    """Usage and last use of one adapter are written at most this often."""
    counts_interval_s: PositiveS = 2.0
    """A base's counts of adapters are written at most this often."""

    poll_wait_s: PositiveS = 10.0
    """Length of one long-poll of a runtime; with `snapshot_stale_s` it bounds how old a Loaded=True can be."""
    poll_pause_s: PositiveS = 0.2
    """Least time between two polls of one runtime, so that a busy one is not polled in a loop."""
    snapshot_stale_s: PositiveS = 5.0
    """A runtime whose polls fail for this long is no longer believed."""
    runtime_timeout_s: PositiveS = 10.0
    """PUT and DELETE of an adapter at a runtime."""
    api_timeout_s: PositiveS = 15.0
    """One call of the API server."""
    start_allowance_s: PositiveS = 1800.0
    """A base that is still starting is not called idle before this long, whatever its idleAfter."""

    log_level: Annotated[str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$")] = "INFO"
    log_format: Annotated[str, Field(pattern="^(text|json)$")] = "json"

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names:
            raise ValueError('needs a comma list of namespaces or "*"')
        return None if names == [ALL_NAMESPACES] else frozenset(names)

    @model_validator(mode="after")
    def _lease_order(self) -> Settings:
        if not self.lease_retry_s * 1.2 < self.lease_renew_deadline_s < self.lease_duration_s:
            raise ValueError("needs lease_retry_s * 1.2 < lease_renew_deadline_s < lease_duration_s")
        return self

    @property
    def watched(self) -> tuple[str | None, ...]:
        """The namespaces to list, (None,) for the whole cluster."""
        return (None,) if self.namespaces is None else tuple(sorted(self.namespaces))


def read_settings(environ: Mapping[str, str], **flags: Any) -> Settings:
    """Settings of this process; flags that are not None win. Raises SettingsError naming the variable."""
    known = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields}
    values: dict[str, Any] = {}
    for key, text in environ.items():
        if key in known:
            if text != "":
                values[known[key]] = text
        elif key.startswith(PREFIX) and not _SERVICE_LINK.search(key):
            raise SettingsError(f"unknown setting {key} in the environment; known: {', '.join(sorted(known))}")
    values.update({name: value for name, value in flags.items() if value is not None})
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(item["loc"], item["msg"]) for item in error.errors())) from error


def read_master_token(path: Path) -> str:
    """The release's master token. Raises SettingsError; the message never holds the token."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{PREFIX}MASTER_TOKEN_FILE {path} cannot be read: {error.strerror}") from error
    if len(token) < MASTER_TOKEN_MIN_CHARS:
        raise SettingsError(f"{PREFIX}MASTER_TOKEN_FILE {path} holds fewer than {MASTER_TOKEN_MIN_CHARS} characters")
    return token


def _sentence(loc: tuple[int | str, ...], message: str) -> str:
    name = f"{PREFIX}{str(loc[0]).upper()}: " if loc else ""
    return name + message.removeprefix("Value error, ")
