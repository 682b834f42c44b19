"""What this package is told from outside: where sources are, and what bounds apply.

Built once in the `__main__` of the operator and the runtime (`SourceSettings.from_env`) and passed
down; nothing else here reads the environment, except that the S3 client finds cloud identities by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

MAX_JSON_BYTES = 4 * MIB
"""adapter_config.json, config.json: a longer one is refused unread."""


LORAPOOL_ENV_NAMES = frozenset(
    {
        "LORAPOOL_OCI_INSECURE_HOSTS",
        "LORAPOOL_OCI_AUTH_HOST",
        "LORAPOOL_OCI_USERNAME",
        "LORAPOOL_OCI_PASSWORD",
    }
)
"""Names with the project's prefix that `SourceSettings.from_env` reads: no unknown settings to the processes."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one resolve, inspection or fetch."""

    max_total_bytes: int = 64 * GIB
    """All files together, by the source's listing and counted again while they arrive."""
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0
    """No byte for so long: SourceTimeout."""
    total_timeout_s: float = 1800.0
    """Everything together, retries included."""


@dataclass(frozen=True, slots=True)
class JudgeLimits:
    """What a base allows of its adapters."""

    max_rank: int
    max_bytes: int = 2 * GIB


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """Where the schemes lead and with which credentials. Secrets stay out of its repr."""

    hf_endpoint: str | None = None
    """None: the public hub."""
    hf_token: str | None = field(default=None, repr=False)
    """None: the token file that huggingface_hub finds, if any."""
    oci_insecure_hosts: frozenset[str] = frozenset()
    """`host` or `host:port` spoken to in plain HTTP. Loopback hosts always are."""
    oci_username: str | None = None
    oci_password: str | None = field(default=None, repr=False)
    """Offered to `oci_auth_host` only; other registries take theirs from the Docker configuration."""
    oci_auth_host: str | None = None
    docker_config: Path | None = None
    """A Docker `config.json` with registry credentials."""
    s3_endpoint: str | None = None
    s3_region: str | None = None
    s3_access_key_id: str | None = field(default=None, repr=False)
    s3_secret_access_key: str | None = field(default=None, repr=False)
    s3_session_token: str | None = field(default=None, repr=False)
    s3_anonymous: bool = False
    s3_virtual_hosted: bool = False
    """Whether a bucket is a host name; with an own endpoint it rarely is."""
    pvc_root: Path | None = None
    """Folder below which claims are mounted by name. None: this process cannot read `pvc://`."""

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str],
        *,
        pvc_root: Path | None = None,
        oci_insecure_hosts: Iterable[str] | None = None,
    ) -> SourceSettings:
        """Reads HF_*, AWS_*, DOCKER_CONFIG and LORAPOOL_OCI_{INSECURE_HOSTS,AUTH_HOST,USERNAME,PASSWORD}."""
        listed = (
            oci_insecure_hosts
            if oci_insecure_hosts is not None
            else env.get("LORAPOOL_OCI_INSECURE_HOSTS", "").split(",")
        )
        return cls(
            hf_endpoint=(env.get("HF_ENDPOINT") or "").rstrip("/") or None,
            hf_token=env.get("HF_TOKEN") or None,
            oci_insecure_hosts=frozenset(host.strip().lower() for host in listed if host.strip()),
            oci_username=env.get("LORAPOOL_OCI_USERNAME") or None,
            oci_password=env.get("LORAPOOL_OCI_PASSWORD") or None,
            oci_auth_host=(env.get("LORAPOOL_OCI_AUTH_HOST") or "").lower() or None,
            docker_config=Path(env["DOCKER_CONFIG"], "config.json") if env.get("DOCKER_CONFIG") else None,
            s3_endpoint=env.get("AWS_ENDPOINT_URL_S3")
            or env.get("AWS_ENDPOINT_URL")
            or env.get("AWS_ENDPOINT")
            or None,
            s3_region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or None,
            s3_access_key_id=env.get("AWS_ACCESS_KEY_ID") or None,
            s3_secret_access_key=env.get("AWS_SECRET_ACCESS_KEY") or None,
            s3_session_token=env.get("AWS_SESSION_TOKEN") or None,
            s3_anonymous=env.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"),
            s3_virtual_hosted=env.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true"),
            pvc_root=pvc_root,
        )
