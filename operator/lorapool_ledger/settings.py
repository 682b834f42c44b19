"""The ledger's settings: one frozen model, read once in `__main__` and passed down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from lorapool_api.basemodel import Namespace
from lorapool_api.settings import Namespaces, ServingSettings, read


class Settings(ServingSettings):
    """What an administrator may set of the ledger, from LORAPOOL_LEDGER_<FIELD>."""

    prefix: ClassVar[str] = "LORAPOOL_LEDGER_"

    database_url: str = Field(default="sqlite:////data/ledger.db", min_length=1, repr=False)
    """`sqlite:////folder/file`, or `postgresql://user:password@host/name` of a PostgreSQL 15 or later."""
    namespaces: Namespaces = None
    """Namespaces whose runtimes are read: a comma-separated list, or "*" for the whole cluster."""
    keys_namespace: Namespace
    """Namespace of the API key Secrets. There is no default, since a wrong guess would read other Secrets."""
    token_file: Path = Path("/etc/lorapool/ledger/token")
    """File with the ledger's own token, which gateways present. During a rotation it has two lines, the current token
    and the previous one. A change is noticed without a restart."""
    master_token_file: Path = Path("/etc/lorapool/master/token")
    """File with the release's master token, from which each base's runtime token is derived. It has two lines during a
    rotation, too. A change is noticed without a restart."""
    internal_ca_file: Path = Path("/etc/lorapool/internal-ca/ca.crt")
    """File with the authorities (PEM) that sign the certificates of this release's runtimes. A change is noticed
    without a restart. It may be missing where no runtime serves TLS."""
    tls_dir: Path | None = None
    """Folder with tls.crt and tls.key, with which the API is served. None: plain HTTP."""
    kubeconfig: Path | None = None
    """Only needed outside a cluster; inside, the pod's service account is used."""
    bill_dir: Path = Path("/etc/lorapool/bill")
    """Folder with `prices.yaml` and `sinks.yaml`, read again within 2 seconds after a change. A file that is missing
    stands for none."""
    sink_secrets_dir: Path = Path("/etc/lorapool/sink-secrets")
    """Folder with the credentials of sinks, one file each, by the names that `sinks.yaml` uses."""
    tuning: bool = False
    """Whether the cluster has FineTuneJobs that the ledger may read. The console lists them."""
    close_after_days: Annotated[int, Field(ge=0, le=27)] = 3
    """Days after the end of a month (UTC) until its invoices are closed. Usage that arrives later appears in the
    invoice of the month that is open then."""

    keep_facts_days: Annotated[int, Field(ge=62)] = 400
    """Days for which the records of single requests, minutes and loads are kept. Sums by hour and day, invoices and
    corrections are kept forever. Facts of an hour with a finding of the reconciliation are kept."""

    listen_host: str = "0.0.0.0"
    """Address of both listeners."""
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the API and the console. 0 takes a free port (tests)."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    """Port of /metrics, /healthz and /readyz. 0 takes a free port (tests)."""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The ledger's settings. Raises SettingsError with one line per mistake."""
    return read(Settings, environ)
