"""The gateway's settings: one frozen model, read once in `__main__` and passed down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from lorapool_api.basemodel import Namespace
from lorapool_api.settings import Namespaces, ServingSettings, read


def _listed(value: object) -> object:
    if not isinstance(value, str):
        return value
    return frozenset(item.strip() for item in value.split(",") if item.strip())


Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[A-Za-z0-9.:\[\]-]+)$")]


class Settings(ServingSettings):
    """What an administrator may set of a gateway, from LORAPOOL_GATEWAY_<FIELD>."""

    prefix: ClassVar[str] = "LORAPOOL_GATEWAY_"

    namespaces: Namespaces = None
    """Namespaces whose objects are watched: a comma-separated list, or "*" for the whole cluster."""
    keys_namespace: Namespace
    """Namespace of the API key Secrets. There is no default, since a wrong guess would read other Secrets."""
    keys_max_age_s: Annotated[float, Field(ge=30)] = 300.0
    """Keys count as stale when the API server has not confirmed them for this long. It does so every 20 seconds."""
    keys_when_stale: Literal["serve", "refuse"] = "serve"
    """What follows for requests with stale keys. serve: the last known keys stay valid, so that an outage of the API
    server ends no service; a revocation is then noticed when it is back. refuse: 503 for every request."""
    master_token_file: Path = Path("/etc/lorapool/master/token")
    """File with the release's master token, from which each base's runtime token is derived. During a rotation it has
    two lines, the current token and the previous one. A change is noticed without a restart."""
    internal_ca_file: Path = Path("/etc/lorapool/internal-ca/ca.crt")
    """File with the authorities (PEM) that sign the certificates of this release's runtimes. A change is noticed
    without a restart. It may be missing where no runtime serves TLS."""
    kubeconfig: Path | None = None
    """Only needed outside a cluster; inside, the pod's service account is used."""

    listen_host: str = "0.0.0.0"
    """Address of both listeners."""
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of the OpenAI API. 0 takes a free port (tests)."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    """Port of /metrics, /healthz and /readyz. 0 takes a free port (tests)."""

    max_body_bytes: Annotated[int, Field(ge=1024, le=64 * 2**20)] = 4 * 2**20
    """A longer request body is refused with 413."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A client must send its whole body within this time, so that a slow sender cannot occupy a handler."""
    max_requests: Annotated[int, Field(ge=1)] = 4096
    """Requests in flight in this process, held ones included."""
    max_held_body_bytes: Annotated[int, Field(ge=1024)] = 192 * 2**20
    """Bytes of request bodies that no runtime has accepted yet; the next request gets 429. Bounds memory."""
    max_held_body_bytes_per_key: Annotated[int, Field(ge=1024)] = 64 * 2**20
    """The same for the requests of one API key."""
    max_connections: Annotated[int, Field(ge=1)] = 8192
    """Open connections of clients; one more is answered with 503 and closed."""
    max_connections_per_address: Annotated[int, Field(ge=1)] = 4096
    """The same for one client address. Behind a proxy, all clients have the addresses of the proxy."""
    head_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """A connection is closed when a request's headers are not complete this long after their first byte."""

    cors_origins: Annotated[frozenset[Origin], BeforeValidator(_listed)] = frozenset()
    """Origins of the pages that may call the API from a browser: a comma-separated list such as
    https://app.example.com, or "*" for every page. A page's key is as public as the page."""

    store_url: str = Field(default="", pattern=r"^(https?://[^/\s]+)?$")
    """URL of the release's store, without a path. Empty: there is none, and no API for files and fine-tuning."""
    store_token_file: Path = Path("/etc/lorapool/store/token")
    """File with the store's master token. Only read if there is a store. A change is noticed without a restart."""
    upload_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """An upload of a file that takes longer is ended with 408. One that sends nothing for `body_timeout_s` is, too."""

    ledger_url: str = Field(default="", pattern=r"^(https?://[^/\s]+)?$")
    """URL of the release's ledger, without a path. Empty: there is none, no journal is kept, and /v1/organization is
    answered with 503."""
    ledger_token_file: Path = Path("/etc/lorapool/ledger/token")
    """File with the ledger's own token. Only read if there is a ledger. A change is noticed without a restart."""
    journal_dir: Path | None = None
    """Folder of the journal of requests, which is kept until the ledger has it. None: no journal is kept."""
    journal_max_bytes: Annotated[int, Field(ge=2**20)] = 512 * 2**20
    """Bytes of the journal: about an hour of 150 requests per second. What comes while it is full is not recorded, and
    counted in a metric; the runtimes' records still bill it."""

    quota_file: Path | None = None
    """JSON file with the quotas of namespaces and models; those of keys are in their Secrets. A change is noticed
    without a restart."""
    quota_rates_when_away: Literal["open-bounded", "closed"] = "open-bounded"
    """While the ledger is away. open-bounded: each gateway keeps to its share of the rates; closed: 503."""
    quota_budgets_when_away: Literal["open-bounded", "closed"] = "closed"
    """While the ledger is away. open-bounded: each gateway uses at most its share of what was left of the month's
    budgets; closed: for `quota_grace_s` only, then 503."""
    quota_grace_s: Annotated[float, Field(ge=0)] = 60.0
    """How long the ledger may be away before closed budgets refuse requests."""

    tuning_unfinished_jobs: Annotated[int, Field(ge=1)] = 64
    """Fine-tuning jobs of one namespace that have not ended; a call that creates a further one gets 429. The operator
    has the same number, and refuses a job that several gateways created at once."""

    connect_timeout_s: Annotated[float, Field(gt=0)] = 1.0
    """TCP connect to a runtime. Pods are near, so a longer connect means that the pod is gone."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A runtime that sends no byte for this long is given up. OpenAI's client waits as long."""
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """A request that takes longer in all, from its arrival to its last byte, is ended with an error, and so is its
    generation."""
    write_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A client that reads nothing of its stream for this long is disconnected, and its generation ended."""
    shutdown_delay_s: Annotated[float, Field(ge=0)] = 5.0
    """After SIGTERM the gateway reports not ready but still accepts requests for this long, so that load balancers
    remove this pod first."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 900.0
    """After that delay, requests in flight have this long to finish. Then streams end with an error event, and other
    requests get 503. The default is the time that a runtime which stops gives its requests."""
    max_tracked_adapters: Annotated[int, Field(ge=0)] = 500
    """Adapters with metric series of their own; the others share one label value."""

    @model_validator(mode="after")
    def _a_journal_is_sent(self) -> Settings:
        if self.journal_dir is not None and not self.ledger_url:
            raise ValueError("journal_dir is set without ledger_url: no record of the journal would ever be sent")
        return self

    @model_validator(mode="after")
    def _a_body_fits_its_budgets(self) -> Settings:
        smallest = min(self.max_held_body_bytes, self.max_held_body_bytes_per_key)
        if smallest < self.max_body_bytes:
            raise ValueError(
                f"max_body_bytes {self.max_body_bytes} must not be above max_held_body_bytes or "
                f"max_held_body_bytes_per_key ({smallest}): no request could have the longest body"
            )
        return self


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The gateway's settings. Raises SettingsError with one line per mistake."""
    return read(Settings, environ)
