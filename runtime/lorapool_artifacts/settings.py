"""Endpoints, credentials and bounds of the artifact sources.

The operator and the runtime read `SourceSettings` as part of their own settings and pass it down. Nothing else here
reads the environment, except that the S3 client finds cloud identities by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from lorapool_api.settings import Env, SettingsGroup, read_group, variables

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

MAX_JSON_BYTES = 4 * MIB
"""A longer adapter_config.json or config.json is refused unread. Naming all 36,000 experts' layers takes 2 MiB."""
MAX_ADAPTER_BYTES = 4 * GIB
"""Files of one adapter. One of rank 128 on all modules of a 70B base has 3.3 GB in bf16."""
MAX_TENSORS = 200_000
"""Tensors in one file. LoRA on all experts of a mixture with 60 layers of 384 experts has 138,240."""

ANY_HOST = "*"
"""The entry of `private_hosts` that stands for every private host."""
TENANT_CREDENTIALS = frozenset(
    {
        "HF_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "LORAPOOL_OCI_AUTH_HOST",
        "LORAPOOL_OCI_USERNAME",
        "LORAPOOL_OCI_PASSWORD",
    }
)
"""The variables that a namespace's own Secret may have. Endpoints are the administrator's."""
STORE_URL, STORE_TOKEN, STORE_CA = "LORAPOOL_STORE_URL", "LORAPOOL_STORE_TOKEN", "LORAPOOL_STORE_CA"
STORE_ACCESS = frozenset({STORE_URL, STORE_TOKEN, STORE_CA})
"""What the operator adds to the credentials of a namespace, so that it can read its own objects of the store."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one resolve, inspection or fetch."""

    max_total_bytes: int = 64 * GIB
    """Size of all files together, checked in the source's listing and again while downloading."""
    connect_timeout_s: float = 10.0
    """One attempt to connect."""
    idle_timeout_s: float = 30.0
    """A source that sends no byte for this long is given up with SourceTimeout."""
    total_timeout_s: float = 1800.0
    """The whole operation, including retries."""
    min_bytes_per_s: int = 0
    """A source that sends a file more slowly is given up with SourceTimeout. Measured over `idle_timeout_s`."""


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """The largest adapter that a base accepts."""

    max_rank: int
    """Largest rank of any module."""
    max_bytes: int = MAX_ADAPTER_BYTES
    """Size of all files together."""
    max_tensors: int = MAX_TENSORS
    """Tensors in its file."""


def _host_list(value: object) -> object:
    if not isinstance(value, str):
        return value
    return frozenset(host.strip().lower() for host in value.split(",") if host.strip())


def _without_slash(url: str | None) -> str | None:
    return url and url.rstrip("/")


def _lower(host: str | None) -> str | None:
    return host and host.lower()


class SourceSettings(SettingsGroup):
    """Endpoints, credentials and bounds of the sources. Secrets stay out of its repr."""

    hf_endpoint: Annotated[str | None, Env("HF_ENDPOINT"), AfterValidator(_without_slash)] = None
    """URL of the model hub; None: the public one."""
    hf_token: Annotated[str | None, Env("HF_TOKEN")] = Field(default=None, repr=False)
    """Token of the hub; None: the token file that huggingface_hub finds, if any."""
    oci_insecure_hosts: Annotated[frozenset[str], Env("LORAPOOL_OCI_INSECURE_HOSTS"), BeforeValidator(_host_list)] = (
        frozenset()
    )
    """Registries (`host` or `host:port`, separated by commas) that are reached over plain HTTP. They may be at private
    addresses."""
    private_hosts: Annotated[frozenset[str], Env("LORAPOOL_SOURCE_PRIVATE_HOSTS"), BeforeValidator(_host_list)] = (
        frozenset()
    )
    """Hosts (`host` or `host:port`, separated by commas) that sources may name although they are at private addresses.
    `*`: every host. HF_ENDPOINT and AWS_ENDPOINT_URL need no entry. Metadata services of clouds are always refused."""
    oci_username: Annotated[str | None, Env("LORAPOOL_OCI_USERNAME")] = None
    """User name for `oci_auth_host` only; credentials of other registries come from the Docker configuration."""
    oci_password: Annotated[str | None, Env("LORAPOOL_OCI_PASSWORD")] = Field(default=None, repr=False)
    """Password or token of `oci_username`."""
    oci_auth_host: Annotated[str | None, Env("LORAPOOL_OCI_AUTH_HOST"), AfterValidator(_lower)] = None
    """The registry that gets `oci_username` and `oci_password`."""
    docker_config: Annotated[Path | None, Env("DOCKER_CONFIG")] = None
    """Folder of a Docker `config.json` with registry credentials."""
    s3_endpoint: Annotated[str | None, Env("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")] = None
    """URL of an S3-compatible store; None: AWS."""
    s3_region: Annotated[str | None, Env("AWS_REGION", "AWS_DEFAULT_REGION")] = None
    """Region of the buckets; None: us-east-1."""
    s3_access_key_id: Annotated[str | None, Env("AWS_ACCESS_KEY_ID")] = Field(default=None, repr=False)
    """Access key; None: an identity of the environment, else anonymous requests."""
    s3_secret_access_key: Annotated[str | None, Env("AWS_SECRET_ACCESS_KEY")] = Field(default=None, repr=False)
    """Secret of `s3_access_key_id`."""
    s3_session_token: Annotated[str | None, Env("AWS_SESSION_TOKEN")] = Field(default=None, repr=False)
    """Session token of temporary credentials."""
    s3_anonymous: Annotated[bool, Env("AWS_SKIP_SIGNATURE")] = False
    """Requests are not signed, for public buckets."""
    s3_virtual_hosted: Annotated[bool, Env("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")] = False
    """The bucket is part of the host name; own endpoints rarely support that."""
    store_url: Annotated[str | None, Env(STORE_URL), AfterValidator(_without_slash)] = None
    """URL of the release's store; None: `store://` sources cannot be read. In a cluster the operator gives runtimes
    this and the next two for each namespace."""
    store_token: Annotated[str | None, Env(STORE_TOKEN)] = Field(default=None, repr=False)
    """Token for the store, which covers the objects that may be read."""
    store_ca: Annotated[str | None, Env(STORE_CA)] = None
    """The authorities (PEM) that sign the store's certificate; None: it is reached over plain HTTP."""
    base_max_bytes: Annotated[int, Env("LORAPOOL_BASE_MAX_BYTES")] = Field(default=200_000_000_000, ge=1)
    """Files of one base model together; a larger one is refused. A base of 70B parameters has 150 GB."""
    max_adapter_bytes: Annotated[int, Env("LORAPOOL_MAX_ADAPTER_BYTES")] = Field(default=MAX_ADAPTER_BYTES, ge=1)
    """Files of one adapter together; a larger one is refused. A runtime holds an adapter in memory while it is in use,
    in the type of the base, and on disk."""
    base_fetch_timeout_s: Annotated[float, Env("LORAPOOL_BASE_FETCH_TIMEOUT_S")] = Field(default=21_600.0, gt=0)
    """Longest download of a base model: 150 GB at 7 MB/s. What was fetched until then is kept for the next attempt."""
    max_tensors: Annotated[int, Env("LORAPOOL_MAX_TENSORS")] = Field(default=MAX_TENSORS, ge=1, le=2_000_000)
    """Tensors in one safetensors file of an adapter or a base, and with them the length of its header: 160 bytes for
    each. Reading a header takes up to 1 KB of memory for each tensor, in operator and runtime."""
    credentials_dir: Annotated[Path | None, Env("LORAPOOL_CREDENTIALS_DIR")] = None
    """Folder with a file for each credential, named like its variable (HF_TOKEN). They win over the environment and are
    read for every use, so that a changed Secret needs no restart."""
    pvc_root: Annotated[Path | None, Env()] = None
    """Folder below which claims are mounted by name. None: this process cannot read `pvc://`."""
    pvc_boundary: Annotated[str, Env()] = ""
    """Folder of the claim that links in a `pvc://` source must not leave. Empty: the whole claim."""
    ambient: Annotated[bool, Env()] = True
    """Whether credentials are used that client libraries find by themselves: token files, the Docker configuration and
    the identity that a cloud gives the process. False for sources that are read with a tenant's rights."""

    def current(self) -> SourceSettings:
        """These settings with the credentials that `credentials_dir` has now; a file that cannot be read is skipped."""
        if self.credentials_dir is None:
            return self
        found = {}
        for (field, *_), names in variables(SourceSettings, "").items():
            for name in reversed(names):
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    found[field] = (self.credentials_dir / name).read_text(encoding="utf-8").strip()
        return SourceSettings.model_validate({**self.model_dump(), **found})

    def with_only(self, credentials: Mapping[str, str]) -> SourceSettings:
        """These settings with no other credentials than these, each named like its variable; others are ignored."""
        given: dict[str, object] = {"ambient": False, "credentials_dir": None, "docker_config": None}
        for (field, *_), names in variables(SourceSettings, "").items():
            if TENANT_CREDENTIALS.union(STORE_ACCESS).intersection(names):
                given[field] = credentials.get(names[0], "").strip() or None
        return SourceSettings.model_validate({**self.model_dump(), **given})

    def credentials_digest(self) -> str:
        """Returns a hash that changes with every credential that is read again for each use."""
        docker = b""
        if self.docker_config is not None:
            with contextlib.suppress(OSError):
                docker = (self.docker_config / "config.json").read_bytes()
        return hashlib.sha256(repr(self.current().model_dump()).encode() + docker).hexdigest()

    @classmethod
    def from_env(cls, environ: Mapping[str, str], *, pvc_root: Path | None = None) -> SourceSettings:
        """The settings of a command line tool, which ignores all other variables. Raises SettingsError.

        It acts for the user of this machine, so that private hosts are not refused.
        """
        found = read_group(cls, environ)
        private, plain = found.private_hosts or frozenset({ANY_HOST}), found.oci_insecure_hosts | LOOPBACK
        return found.model_copy(update={"pvc_root": pvc_root, "private_hosts": private, "oci_insecure_hosts": plain})
