"""The BaseModel object: one frozen base and how it is run, scaled and shared.

Read by operator (which owns its status) and gateway. Bounds and rules that one object can
know are written to the CRD as schema and CEL by `python -m lorapool_api`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from lorapool_api.common import ApiModel, Condition, Duration, Quantity

KIND = "BaseModel"
PLURAL = "basemodels"

NAME_MAX = 40
"""Children are named after the base with a suffix, and a label value ends at 63."""

Namespace = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]


def rule(cel: str, message: str) -> dict[str, str]:
    """One CEL rule of the CRD."""
    return {"rule": cel, "message": message}


def rules(*items: dict[str, str]) -> dict[str, Any]:
    """`json_schema_extra` of a model with CEL rules."""
    return {"x-kubernetes-validations": list(items)}


class DType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class BaseSource(ApiModel):
    """Where the base's files lie."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "['hf://', 'oci://', 's3://', 'pvc://'].exists(p, self.uri.startsWith(p))",
                "source.uri must start with hf://, oci://, s3:// or pvc://",
            )
        )
    )

    uri: str = Field(
        min_length=7,
        max_length=512,
        description="hf://org/name, oci://registry/repo:tag, s3://bucket/prefix or pvc://claim/path.",
    )
    revision: str | None = Field(
        default=None, min_length=1, max_length=128, description="Branch, tag or commit of an hf:// source."
    )


class BaseLora(ApiModel):
    """What the runtime sets aside for adapters."""

    max_rank: int = Field(
        default=16, ge=1, le=256, description="Largest adapter rank that is served; memory is set aside for it."
    )
    slots: int = Field(default=8, ge=1, le=1024, description="Adapters on the device of one replica at one time.")
    host_cache_bytes: Quantity = Field(default="1Gi", description="Adapters kept in host memory of one replica.")


class Scaling(ApiModel):
    """How many replicas run."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.minReplicas <= self.maxReplicas", "scaling.minReplicas must not exceed scaling.maxReplicas"),
        )
    )

    min_replicas: int = Field(default=0, ge=0, le=100, description="0 lets an idle base stop all its pods.")
    max_replicas: int = Field(default=1, ge=1, le=100)
    target_in_flight: int = Field(
        default=16, ge=1, le=10000, description="Requests under way per replica at which one more is started."
    )
    idle_after: Duration = Field(
        default="10m", description="A base without any request for this long goes to minReplicas."
    )
    scale_down_delay: Duration = Field(
        default="2m", description="Load must stay low for this long before a replica is taken away."
    )


class ColdStart(ApiModel):
    """How requests wait while no replica or slot is ready."""

    max_wait: Duration = Field(default="5m", description="A held request gets 503 with Retry-After past this.")
    max_queued: int = Field(default=256, ge=1, le=100000, description="Held requests per gateway; the next gets 429.")


class AdapterDefaults(ApiModel):
    """Used where a LoraAdapter leaves the field out."""

    idle_after: Duration = Field(default="5m", description="An adapter unused for this long leaves the device.")
    min_replicas: int = Field(default=0, ge=0, le=100)
    max_replicas: int = Field(default=1, ge=1, le=100)


class Access(ApiModel):
    """Who else may stand on this base."""

    namespaces: list[Namespace] = Field(
        default_factory=list,
        max_length=256,
        description='Other namespaces whose LoraAdapters may use this base. "*" is not accepted: list them.',
    )


class BaseModelSpec(ApiModel):
    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.source == oldSelf.source", "source is immutable: create a new BaseModel for other weights"),
            rule(
                "!has(self.replicas) || self.replicas <= self.scaling.maxReplicas",
                "replicas must not exceed scaling.maxReplicas",
            ),
        )
    )

    source: BaseSource
    served_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$",
        description="Extra model name under which clients reach the base itself.",
    )
    dtype: DType = DType.AUTO
    max_model_len: int = Field(
        default=2048, ge=16, le=1048576, description="Prompt plus completion tokens of one request."
    )
    lora: BaseLora = Field(default_factory=BaseLora)
    runtime_profile: str = Field(
        default="default", min_length=1, max_length=63, description="Name of a profile in the chart's runtimeProfiles."
    )
    replicas: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Written through the scale subresource by autoscaler and gateway; leave it out of manifests.",
    )
    scaling: Scaling = Field(default_factory=Scaling)
    cold_start: ColdStart = Field(default_factory=ColdStart)
    adapter_defaults: AdapterDefaults = Field(default_factory=AdapterDefaults)
    access: Access = Field(default_factory=Access)


class AdapterCounts(ApiModel):
    """LoraAdapters that name this base."""

    total: int = 0
    ready: int = 0
    loaded: int = 0
    failed: int = 0


class PodStatus(ApiModel):
    name: str = Field(max_length=253)
    uid: str = Field(max_length=64)
    boot_id: str | None = Field(default=None, max_length=64)
    ready: bool = False
    draining: bool = False


class BaseModelStatus(ApiModel):
    observed_generation: int | None = None
    conditions: list[Condition] = Field(default_factory=list, max_length=16)
    replicas: int = 0
    """Pods that exist and are not terminating (statusReplicasPath of the scale subresource)."""
    ready_replicas: int = 0
    selector: str | None = Field(default=None, max_length=512)
    revision: str | None = Field(default=None, max_length=256)
    digest: str | None = Field(default=None, max_length=80)
    state: str | None = Field(
        default=None, max_length=64, description="Reason of the Ready condition, for the STATE column."
    )
    adapters: AdapterCounts = Field(default_factory=AdapterCounts)
    pods: list[PodStatus] = Field(default_factory=list, max_length=100)
    last_used: str | None = Field(default=None, max_length=64, json_schema_extra={"format": "date-time"})
