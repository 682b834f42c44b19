"""The LoraAdapter object: one fine-tune, by source and digest, on a base.

Read by operator (which owns its status) and gateway. A parked adapter is Ready: `Ready=True,
Loaded=False reason=Parked`. Status is only ever what was seen.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from lorapool_api.basemodel import BaseSource, Namespace, rule, rules
from lorapool_api.common import DIGEST_PATTERN, ApiModel, Condition, Duration

KIND = "LoraAdapter"
PLURAL = "loraadapters"

NAME_MAX = 63


class BaseModelRef(ApiModel):
    name: str = Field(min_length=1, max_length=40, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    namespace: Namespace | None = Field(
        default=None, description="The adapter's own namespace when left out; another one must list ours."
    )


class AdapterSource(BaseSource):
    """Where the adapter's files lie, and what they must be."""

    digest: str | None = Field(
        default=None,
        max_length=71,
        pattern=DIGEST_PATTERN,
        description="Expected digest over the adapter's files; anything else is refused. Locked into status if absent.",
    )


class LoraAdapterSpec(ApiModel):
    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.baseModelRef == oldSelf.baseModelRef",
                "baseModelRef is immutable: an adapter only fits the base it was trained on",
            ),
            rule(
                "!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
                "minReplicas must not exceed maxReplicas",
            ),
        )
    )

    base_model_ref: BaseModelRef
    source: AdapterSource
    alias: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$",
        description="One more model name; the older object keeps it when two want it.",
    )
    idle_after: Duration | None = Field(
        default=None, description="Unused for this long: leaves the device. Default: the base's adapterDefaults."
    )
    min_replicas: int | None = Field(
        default=None, ge=0, le=100, description="Above 0 keeps it loaded on that many replicas."
    )
    max_replicas: int | None = Field(default=None, ge=1, le=100)
    suspend: bool = Field(
        default=False, description="Requests are refused and the adapter leaves the device; the object stays."
    )


class ReplicaStatus(ApiModel):
    """Where a runtime itself reports this adapter, at which tier, under which boot id."""

    pod: str = Field(max_length=253)
    pod_uid: str = Field(alias="podUID", max_length=64)
    boot_id: str = Field(alias="bootID", max_length=64)
    digest: str = Field(max_length=80)
    tier: str = Field(max_length=16)
    since: str = Field(max_length=64, json_schema_extra={"format": "date-time"})


class UsagePart(ApiModel):
    """What one runtime process (boot id) has counted; folded into the totals when that process is gone."""

    boot_id: str = Field(alias="bootID", max_length=64)
    requests: int = 0
    failed_requests: int = 0
    cancelled_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    residency_seconds: float = 0.0


class UsageStatus(ApiModel):
    """Totals since the object exists; written at most once a minute."""

    requests: int = 0
    failed_requests: int = 0
    cancelled_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    residency_seconds: float = 0.0
    as_of: str | None = Field(default=None, max_length=64, json_schema_extra={"format": "date-time"})
    parts: list[UsagePart] = Field(
        default_factory=list, max_length=100, description="The share of the totals that live runtimes still report."
    )


class FailureStatus(ApiModel):
    reason: str = Field(max_length=64)
    message: str = Field(max_length=1024)
    attempts: int = 0
    retry_at: str | None = Field(default=None, max_length=64, json_schema_extra={"format": "date-time"})
    """Absent: terminal, until the spec, a secret or the retry annotation changes."""


class LoraAdapterStatus(ApiModel):
    observed_generation: int | None = None
    conditions: list[Condition] = Field(default_factory=list, max_length=16)
    state: str | None = Field(
        default=None, max_length=64, description="One word for the STATE column: the most telling reason."
    )
    revision: str | None = Field(default=None, max_length=256)
    digest: str | None = Field(default=None, max_length=80)
    source_uri: str | None = Field(
        default=None, max_length=512, description="The uri and revision that digest was resolved from."
    )
    source_revision: str | None = Field(default=None, max_length=128)
    rank: int | None = None
    target_modules: list[Annotated[str, Field(max_length=128)]] = Field(default_factory=list, max_length=64)
    size_bytes: int | None = None
    loaded_replicas: int = 0
    loaded: str | None = Field(default=None, max_length=16, description='"n/m" for the LOADED column.')
    replicas: list[ReplicaStatus] = Field(default_factory=list, max_length=100)
    last_used: str | None = Field(default=None, max_length=64, json_schema_extra={"format": "date-time"})
    usage: UsageStatus | None = None
    failure: FailureStatus | None = None
    observed_retry: str | None = Field(
        default=None, max_length=256, description="Value of the retry annotation that was last acted on."
    )
    judged: str | None = Field(
        default=None,
        max_length=96,
        description="Fingerprint of everything the recorded verdict depends on: source, base, retry annotation.",
    )
