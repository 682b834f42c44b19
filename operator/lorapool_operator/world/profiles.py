"""Runtime profiles: what an administrator, never a tenant, decides about runtime pods.

Parsed from the YAML file that the chart mounts; read at start and again on each resync. A file with an
unknown key or a bad value is refused whole, and the profiles read before stay in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from lorapool_api.common import Quantity


class ProfilesError(Exception):
    """The profiles file cannot be used; the message names file and field."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )


class ClaimVolume(_Strict):
    claim: str = Field(min_length=1, max_length=253)
    """A PersistentVolumeClaim in the BaseModel's namespace, mounted at /pvc/<claim>."""
    read_only: bool = True


class RuntimeProfile(_Strict):
    """One profile. Where Kubernetes has a type of its own the value is passed on as it is."""

    image: str = ""
    """Empty: the operator's runtime image."""
    image_pull_policy: str = Field(default="", pattern="^(Always|IfNotPresent|Never)?$")
    image_pull_secrets: tuple[str, ...] = ()
    resources: dict[str, Any] = Field(default_factory=dict)
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[dict[str, Any], ...] = ()
    affinity: dict[str, Any] = Field(default_factory=dict)
    priority_class_name: str = ""
    runtime_class_name: str = ""
    env: tuple[dict[str, Any], ...] = ()
    """Kubernetes EnvVar items; `valueFrom.secretKeyRef` lets the kubelet, not the operator, read secrets."""
    volumes: tuple[ClaimVolume, ...] = ()
    cache_size_limit: Quantity = "20Gi"
    """emptyDir at /cache: base files and adapters on disk."""
    tmp_size_limit: Quantity = "1Gi"
    shm_size_limit: str = ""
    """When set: memory-backed emptyDir at /dev/shm."""
    threads: int = Field(default=0, ge=0)
    """torch threads; 0: the cores the container may use."""
    termination_grace_period_seconds: int = Field(default=60, ge=5)
    """Running requests may finish for this long, less 5 s."""
    startup_timeout_seconds: int = Field(default=900, ge=30)
    """Download and load of the base; past it the kubelet restarts the container."""
    run_as_user: int = Field(default=10001, ge=1)
    pod_labels: dict[str, str] = Field(default_factory=dict)
    pod_annotations: dict[str, str] = Field(default_factory=dict)


Profiles = Mapping[str, RuntimeProfile]


class _File(_Strict):
    profiles: dict[str, RuntimeProfile]


def parse_profiles(text: str, *, origin: str) -> Profiles:
    """Profiles by name. Raises ProfilesError."""
    try:
        return _File.model_validate(yaml.safe_load(text)).profiles
    except yaml.YAMLError as error:
        raise ProfilesError(f"{origin} is no YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ProfilesError(f"{origin}: {told}") from error


def read_profiles(path: Path) -> Profiles:
    """Profiles of a file. Raises ProfilesError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfilesError(f"{path} cannot be read: {error.strerror}") from error
    return parse_profiles(text, origin=str(path))
