"""The operator's settings: one frozen model, read once in `__main__` and passed down."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorapool_api.basemodel import Namespace
from lorapool_api.settings import Namespaces, ProcessSettings, read
from lorapool_artifacts.policy import DEFAULT_SECRET
from lorapool_artifacts.settings import SourceSettings

PositiveS = Annotated[float, Field(gt=0)]


class Settings(ProcessSettings):
    """What an administrator may set of an operator, from LORAPOOL_OPERATOR_<FIELD>."""

    prefix: ClassVar[str] = "LORAPOOL_OPERATOR_"

    namespaces: Namespaces = None
    """Namespaces whose objects are watched: a comma-separated list, or "*" for the whole cluster."""
    own_namespace: Namespace
    """Namespace of the Lease. There is no default, since two releases must not share one by accident."""
    identity: str = Field(default_factory=socket.gethostname, min_length=1, max_length=253)
    """Holder of the Lease: the pod's name."""
    kubeconfig: Path | None = None
    """Only needed outside a cluster; inside, the pod's service account is used."""
    sources: SourceSettings = SourceSettings()
    """Endpoints and credentials of the artifact sources that are inspected."""

    leader_election: bool = True
    """Off only in tests with one process."""
    lease_name: str = Field(default="lorapool-operator", pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    """Name of the Lease that the replicas of one release compete for."""
    lease_duration_s: Annotated[int, Field(ge=2)] = 15  # whole seconds in the Lease itself
    """A standby takes over this long after the leader's last renewal."""
    lease_renew_deadline_s: PositiveS = 10.0
    """A leader that could not renew for this long stops acting, well before the standby starts."""
    lease_retry_s: PositiveS = 2.0
    """Pause between two attempts to take or renew the Lease."""

    runtime_image: str = Field(min_length=1)
    """Image of runtime pods whose profile names none, and of trainers."""
    runtime_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Pull policy of that image."""
    runtime_vllm_image: str = ""
    """Image of runtime pods whose profile has the engine vllm and names none. Empty: such profiles have to name one."""
    runtime_vllm_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Pull policy of that image."""
    profiles_file: Path
    """YAML file of runtime profiles, read again within 2 seconds after a change."""
    source_policy_file: Path | None = None
    """YAML file with the sources that each namespace may use, read again within 2 seconds after a change. None: no
    namespace has rules of its own."""
    namespace_credentials: str = DEFAULT_SECRET
    """Name of the Secret with a namespace's own credentials for sources, unless the policy names another. Empty: none
    is read."""
    master_token_file: Path = Path("/etc/lorapool/master/token")
    """File with the release's master token, from which each base's runtime token is derived. During a rotation it has
    two lines, the current token and the previous one. A change is noticed without a restart."""
    internal_ca_dir: Path = Path("/etc/lorapool/internal-ca")
    """Folder with `ca.crt`, the authorities (PEM) that are trusted to sign the certificates of this release's runtimes,
    and with `tls.crt` and `tls.key`, the one with which the operator signs. A change is noticed without a restart."""
    internal_tls: bool = False
    """New runtime pods serve HTTPS, with certificates that the operator issues. Off, they serve HTTP; pods of the other
    kind are used until they are replaced."""

    tuning: bool = False
    """Acts on FineTuneJobs. Off, they are not even watched, and the rights for them are not needed."""
    tuning_active_jobs: Annotated[int, Field(ge=1)] = 8
    """Jobs of one namespace that train at the same time; further ones wait."""
    tuning_unfinished_jobs: Annotated[int, Field(ge=1)] = 64
    """Jobs of one namespace that have not ended; further ones are refused."""
    tuning_month_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that jobs of one namespace train in a calendar month (UTC); its jobs then wait for the next one. 0: no
    limit. What was trained is kept in the ConfigMap `<lease_name>-tokens` of the own namespace."""
    tuning_status_interval_s: PositiveS = 10.0
    """Shortest time between two writes of one job's progress. A new state is written at once."""
    tuning_priority_class: str = ""
    """PriorityClass of trainers' pods whose profile names none; empty: that of the profile's other pods."""

    store_url: str = Field(default="", pattern=r"^(https?://[^/\s]+)?$")
    """URL of the release's store, without a path. Empty: there is none, and `store://` sources cannot be read."""
    store_token_file: Path = Path("/etc/lorapool/store/token")
    """File with the store's master token, which signs the tokens of namespaces and jobs. Only read if there is a
    store. During a rotation it has two lines, the current token and the previous one. A change is noticed without a
    restart."""
    store_tls_secret: str = Field(default="", pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$")
    """Name of the Secret in the own namespace that gets a certificate for the store. Empty: none is issued."""
    ledger_tls_secret: str = Field(default="", pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$")
    """Name of the Secret in the own namespace that gets a certificate for the ledger. Empty: none is issued."""
    runtime_usage: bool = False
    """Runtime pods keep records of what each request used until the release's ledger has them."""

    metrics_host: str = "0.0.0.0"
    """Address of the metrics listener."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    """Port of /metrics, /healthz and /readyz. 0 takes a free port (tests)."""
    max_tracked_adapters: Annotated[int, Field(ge=0)] = 2000
    """Adapters with metric series of their own, the oldest; the others of a namespace share `<namespace>/__other__`, so
    that sums by base and by namespace are complete."""

    resync_s: PositiveS = 45.0
    """Every object is reconciled again this often, which bounds the cost of a lost watch event."""
    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """Objects reconciled concurrently; each mostly waits for the API server."""
    inspection_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    """Sources of adapters inspected concurrently, and as many of base models. One namespace uses half at most."""
    inspection_timeout_s: PositiveS = 120.0
    """An inspection that takes longer ends as SourceTimeout and is retried."""
    pending_status_s: PositiveS = 5.0
    """An inspection that takes longer is shown in the status; a shorter one costs no extra write."""
    retry_min_s: PositiveS = 5.0
    """First wait after a transient failure. It doubles each time, with jitter."""
    retry_max_s: PositiveS = 300.0
    """Longest wait between two attempts."""
    source_check_s: PositiveS = 3600.0
    """How often the source of an adapter that can change (a tag, a branch, a folder) is looked at for newer files."""
    source_poll_s: PositiveS = 300.0
    """The same for adapters with spec.source.updatePolicy Poll."""
    usage_interval_s: PositiveS = 60.0
    """Shortest time between two writes of one adapter's usage and last use."""
    load_status_interval_s: PositiveS = 10.0
    """Loading and unloading an adapter is written to its status once in this time on average, and four times in a row
    at most. A status that says Loaded=True is corrected at once all the same."""
    counts_interval_s: PositiveS = 2.0
    """Shortest time between two writes of a base's adapter counts."""

    poll_wait_s: PositiveS = 10.0
    """Length of one long-poll of a runtime. With `snapshot_stale_s` it bounds how old a Loaded=True can be."""
    poll_pause_s: PositiveS = 0.2
    """Shortest time between two polls of one runtime, so that a busy one is not polled in a loop."""
    snapshot_stale_s: PositiveS = 5.0
    """The last snapshot of a runtime whose polls fail for this long is discarded."""
    runtime_timeout_s: PositiveS = 10.0
    """PUT or DELETE of an adapter at a runtime."""
    api_timeout_s: PositiveS = 15.0
    """One call of the API server."""
    api_qps: PositiveS = 400.0
    """Requests to the API server per second, apart from the Lease's and the watches'."""
    api_burst: Annotated[int, Field(ge=1)] = 800
    """Requests that may be sent at once after a quiet time."""
    max_concurrent_rollouts: Annotated[int, Field(ge=0)] = 1
    """Bases whose pods are replaced at the same time after a change of their template. 0 is no bound."""
    start_allowance_s: PositiveS = 600.0
    """Time to schedule a runtime pod and to pull its image. A base that does not serve after this and the profile's
    startupTimeoutSeconds is scaled down again, if it may have no replica."""
    start_retry_min_s: PositiveS = 60.0
    """Gateways do not start a base again for this long after a failed start. The wait doubles each time."""
    start_retry_max_s: PositiveS = 1800.0
    """Longest wait after a failed start."""

    @model_validator(mode="after")
    def _lease_order(self) -> Settings:
        if not self.lease_retry_s * 1.2 < self.lease_renew_deadline_s < self.lease_duration_s:
            raise ValueError("the Lease needs lease_retry_s * 1.2 < lease_renew_deadline_s < lease_duration_s")
        return self

    @property
    def watched(self) -> tuple[str | None, ...]:
        """The namespaces to list, (None,) for the whole cluster."""
        return (None,) if self.namespaces is None else tuple(sorted(self.namespaces))


def read_settings(environ: Mapping[str, str], *, kubeconfig: Path | None = None) -> Settings:
    """The operator's settings; `kubeconfig` is the flag. Raises SettingsError with one line per mistake."""
    return read(Settings, environ, {} if kubeconfig is None else {"kubeconfig": kubeconfig})
