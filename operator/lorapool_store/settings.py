"""The store's settings: one frozen model, read once in `__main__` and passed down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from lorapool_api.settings import ServingSettings, read


class Settings(ServingSettings):
    """What an administrator may set of the store, from LORAPOOL_STORE_<FIELD>."""

    prefix: ClassVar[str] = "LORAPOOL_STORE_"

    location: Annotated[str, Field(pattern=r"^(file:///|s3://|gs://|az://)\S+$")] = "file:///data"
    """Where objects are stored: file:///folder, s3://bucket/prefix, gs://bucket/prefix or az://account/container/prefix.
    Buckets take their credentials and endpoint from the provider's own variables (AWS_*, GOOGLE_*, AZURE_*)."""
    master_token_file: Path = Path("/etc/lorapool/store/token")
    """File with the store's master token, which signs the tokens of callers. During a rotation it has two lines, the
    current token and the previous one. A change is noticed without a restart."""
    tls_dir: Path | None = None
    """Folder with tls.crt and tls.key, with which the API is served. None: plain HTTP."""

    listen_host: str = "0.0.0.0"
    """Address of both listeners."""
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the objects. 0 takes a free port (tests)."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    """Port of /metrics, /healthz and /readyz. 0 takes a free port (tests)."""

    max_object_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**30
    """A larger object is refused with 413."""
    quota_bytes: Annotated[int, Field(ge=1024)] = 20 * 2**30
    """Bytes of all objects of one namespace; what would exceed it is refused with 507."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """An upload that sends nothing for this long is given up with 408."""
    sweep_s: Annotated[float, Field(gt=0)] = 60.0
    """Pause between two looks for objects that have expired."""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The store's settings. Raises SettingsError with one line per mistake."""
    return read(Settings, environ)
