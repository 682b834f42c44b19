"""The LoraAdapter object: one fine-tune of a base, identified by source and digest.

The operator owns its status, which only reports what was observed. An adapter that is unloaded because it is idle is
still ready: `Ready=True, Loaded=False reason=Parked`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from lorapool_api.basemodel import BaseSource, Namespace, rule, rules, schemes
from lorapool_api.chat import ChatReport, ChatTemplate, Generation
from lorapool_api.common import DIGEST_PATTERN, ApiModel, Condition, Duration

KIND = "LoraAdapter"
PLURAL = "loraadapters"

NAME_MAX = 63


class BaseModelRef(ApiModel):
    """The BaseModel that an adapter was trained on."""

    name: str = Field(
        min_length=1, max_length=40, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="Name of the BaseModel."
    )
    namespace: Namespace | None = Field(
        default=None,
        description="Namespace of the BaseModel. Default: the adapter's own. A base in another namespace must list the "
        "adapter's namespace in spec.access.namespaces.",
    )


class UpdatePolicy(StrEnum):
    """What follows when a source whose files can change, such as a tag or a branch, holds newer files."""

    PINNED = "Pinned"
    POLL = "Poll"


class AdapterSource(BaseSource):
    """Location and expected content of the adapter's files."""

    model_config = ConfigDict(json_schema_extra=schemes("hf://", "oci://", "s3://", "pvc://", "store://"))

    uri: str = Field(
        min_length=7,
        max_length=512,
        description="Location of the files: hf://org/name[/folder], oci://registry/repo:tag[/folder], "
        "s3://bucket/prefix, pvc://claim/path or, in the release's own store, store://namespace/key.",
    )
    digest: str | None = Field(
        default=None,
        max_length=71,
        pattern=DIGEST_PATTERN,
        description="Expected digest of the adapter's files; other content is refused. Without it, the digest "
        "that was resolved first is recorded in the status and enforced until the source changes.",
    )
    update_policy: UpdatePolicy = Field(
        default=UpdatePolicy.PINNED,
        description="What follows when the source holds newer files, as after a push to the same tag. Pinned: the "
        "files that were resolved first keep being served, and the condition Outdated says that there are newer ones. "
        "Poll: the newer files are checked, loaded and served instead. A digest or an immutable revision is always "
        "pinned.",
    )


class LoraAdapterSpec(ApiModel):
    """The desired state of a LoraAdapter."""

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
            rule(
                "!has(self.alias) || !self.alias.contains('/')", "alias must not contain a slash: that is a full name"
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
        description="Additional model name for clients, without a slash. It is unique among the models of the base's "
        "namespace: the first object to claim it keeps it; others have the condition NameConflict.",
    )
    idle_after: Duration | None = Field(
        default=None,
        description="The adapter is unloaded from the device after this long without requests. Default: the base's "
        "adapterDefaults.",
    )
    min_replicas: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Replicas on which the adapter stays loaded even when it is idle. Default: the base's "
        "adapterDefaults.",
    )
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Largest number of replicas over which the adapter's requests are spread. Default: the base's "
        "adapterDefaults.",
    )
    chat_template: ChatTemplate | None = Field(
        default=None,
        description="How conversations are written for this adapter. Default: with the template in its files, or the "
        "base's where they have none.",
    )
    generation: Generation | None = Field(
        default=None, description="How answers of this adapter end. Default: as the adapter's files say."
    )
    suspend: bool = Field(default=False, description="True refuses requests and unloads the adapter from all devices.")


class ReplicaStatus(ApiModel):
    """One replica that holds the adapter, as its runtime reports it."""

    pod: str = Field(max_length=253, description="Name of the runtime pod.")
    pod_uid: str = Field(alias="podUID", max_length=64, description="Uid of the runtime pod.")
    boot_id: str = Field(
        alias="bootID", max_length=64, description="Identifier of the runtime process; it changes with every restart."
    )
    digest: str = Field(max_length=80, description="Digest of the files that the replica holds.")
    tier: str = Field(max_length=16, description="Best copy on the replica: device, host or disk.")
    since: str = Field(
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="When the adapter entered this tier.",
    )


class PlacementStatus(ApiModel):
    """The preferred replicas of an adapter that is pinned or has more than one; any other adapter has one."""

    k: int = Field(
        ge=1, description="Number of preferred replicas: the first k of the order that operator and gateways compute."
    )
    replicas: list[Annotated[str, Field(max_length=253)]] = Field(
        default_factory=list, max_length=100, description="Names of their pods, the most preferred one first."
    )
    why: str = Field(default="", max_length=256, description="Why k has this value.")


class UsageCounters(ApiModel):
    """What is counted for an adapter."""

    requests: int = 0
    """Requests that ended, including failed and cancelled ones. Refused requests are not counted."""
    failed_requests: int = 0
    """Requests that ended with an error."""
    cancelled_requests: int = 0
    """Requests whose client disconnected before the end."""
    prompt_tokens: int = 0
    """Tokens of prompts, cached ones included."""
    cached_tokens: int = 0
    """Tokens of prompts that were not computed again."""
    completion_tokens: int = 0
    """Generated tokens."""
    loads: int = 0
    """Loads onto a device."""
    load_seconds: float = 0.0
    """Duration of all loads."""
    residency_seconds: float = 0.0
    """Time on a device, summed over replicas."""


class UsagePart(UsageCounters):
    """Usage counted by one runtime process. It is merged into the totals when the process is gone."""

    boot_id: str = Field(alias="bootID", max_length=64, description="Identifier of the runtime process.")


class UsageStatus(UsageCounters):
    """Usage since the object was created. Written at most once a minute."""

    as_of: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="When these numbers were written.",
    )
    parts: list[UsagePart] = Field(
        default_factory=list,
        max_length=200,
        description="The part of the totals that running runtime processes still report.",
    )


class FailureStatus(ApiModel):
    """The last failure of the adapter."""

    reason: str = Field(max_length=64, description="One of the documented failure reasons.")
    message: str = Field(max_length=1024, description="What is wrong and the remedy.")
    attempts: int = 0
    """Failed attempts so far."""
    retry_at: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="Time of the next attempt. Absent for a terminal failure, which lasts until the spec, a Secret or "
        "the retry annotation changes.",
    )


class LoraAdapterStatus(ApiModel):
    """The observed state of a LoraAdapter."""

    observed_generation: int | None = None
    """The metadata.generation that this status describes."""
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Resolved, Compatible, Loaded, Ready and Progressing; NameConflict, Outdated, Reconciling or "
        "Stalled while they apply.",
    )
    state: str | None = Field(
        default=None, max_length=64, description="The most specific reason of all conditions, for the STATE column."
    )
    alias: str | None = Field(
        default=None, max_length=128, description="The value of spec.alias while the adapter has that model name."
    )
    revision: str | None = Field(
        default=None, max_length=256, description="Immutable revision to which the source was resolved."
    )
    digest: str | None = Field(default=None, max_length=80, description="Digest of the adapter's files.")
    source_uri: str | None = Field(
        default=None, max_length=512, description="The spec.source.uri from which the digest was resolved."
    )
    source_revision: str | None = Field(
        default=None, max_length=128, description="The spec.source.revision from which the digest was resolved."
    )
    rank: int | None = None
    """Largest rank of the adapter's modules."""
    target_modules: list[Annotated[str, Field(max_length=128)]] = Field(
        default_factory=list, max_length=64, description="Last parts of the names of the modules that it changes."
    )
    size_bytes: int | None = None
    """Size of the adapter's files."""
    loaded_replicas: int = 0
    """Replicas on whose device the adapter is loaded."""
    loaded: str | None = Field(
        default=None, max_length=16, description='Loaded and existing replicas as "n/m", for the LOADED column.'
    )
    replicas: list[ReplicaStatus] = Field(
        default_factory=list, max_length=100, description="The replicas that hold the adapter."
    )
    placement: PlacementStatus | None = None
    chat: ChatReport | None = Field(
        default=None, description="The chat template and stop tokens in use, as a runtime that read the files reports."
    )
    last_used: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="When a request for the adapter was last accepted or ended.",
    )
    usage: UsageStatus | None = None
    failure: FailureStatus | None = None
    observed_retry: str | None = Field(
        default=None, max_length=256, description="Value of the retry annotation that was last handled."
    )
    judged: str | None = Field(
        default=None,
        max_length=96,
        description="Fingerprint of the inputs of the last compatibility check: source, base and retry annotation.",
    )
