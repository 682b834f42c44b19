"""The BaseModel object: one base model and how it is run, scaled and shared.

The operator owns its status. Field descriptions, bounds and CEL rules become the CRD's schema, and thereby its
reference documentation.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from lorapool_api.base_modules import BaseModules
from lorapool_api.chat import BaseChatTemplate, ChatReport, Generation
from lorapool_api.common import DECIMAL_PATTERN, ApiModel, Condition, Duration, Quantity

KIND = "BaseModel"
PLURAL = "basemodels"

NAME_MAX = 40
"""Longest name: children are named after the base plus a suffix, and label values have at most 63 characters."""

Namespace = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]


SOURCE_PREFIX_PATTERN = r"^(hf|oci|s3|pvc|store)://[^\s\\%?#@]*$"
"""The start of source URIs, up to a slash or the end of a name."""
SourcePrefix = Annotated[str, Field(min_length=5, max_length=512, pattern=SOURCE_PREFIX_PATTERN)]


def rule(cel: str, message: str) -> dict[str, str]:
    """One CEL rule of the CRD."""
    return {"rule": cel, "message": message}


def rules(*items: dict[str, str]) -> dict[str, Any]:
    """`json_schema_extra` of a model with CEL rules."""
    return {"x-kubernetes-validations": list(items)}


def schemes(*prefixes: str) -> dict[str, Any]:
    """`json_schema_extra` of a source whose URI starts with one of these."""
    wanted = f"source.uri must start with {', '.join(prefixes[:-1])} or {prefixes[-1]}"
    return rules(rule(f"{list(prefixes)}.exists(p, self.uri.startsWith(p))", wanted))


class DType(StrEnum):
    """Number format of weights and activations. `auto` keeps the format of the files where the device supports it."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class BaseSource(ApiModel):
    """Location of the base's files."""

    model_config = ConfigDict(json_schema_extra=schemes("hf://", "oci://", "s3://", "pvc://"))

    uri: str = Field(
        min_length=7,
        max_length=512,
        description="Location of the files: hf://org/name[/folder], oci://registry/repo:tag[/folder], "
        "s3://bucket/prefix or pvc://claim/path.",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="Branch, tag or commit of an hf:// source, or tag or digest of an oci:// source. Default: the "
        "uri's own, else the newest.",
    )


class BaseLora(ApiModel):
    """Capacity that each replica reserves for adapters."""

    max_rank: int = Field(
        default=16,
        ge=1,
        le=256,
        description="Largest rank of an adapter. Every slot reserves memory for it.",
    )
    slots: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Adapters that one replica can have loaded on its device at the same time.",
    )
    max_pinned: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="Slots of one replica that adapters with minReplicas above 0 may occupy. Default: half of the "
        "slots. Older adapters come first.",
    )
    max_pinned_per_namespace: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="The same bound for the adapters of one namespace. Default: no bound of its own.",
    )
    host_cache_bytes: Quantity = Field(
        default="1Gi",
        description="Host memory of one replica for adapters that are not on the device, as a quantity such as 512Mi.",
    )


class ScalingMode(StrEnum):
    """Who decides the number of replicas.

    Internal: the operator, from the load. External: an autoscaler such as HPA or KEDA, through the scale subresource;
    the operator then only wakes a base that is scaled to zero, and scales an idle one to zero where minReplicas is 0.
    """

    INTERNAL = "Internal"
    EXTERNAL = "External"


class Scaling(ApiModel):
    """When replicas are started and stopped."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.minReplicas <= self.maxReplicas", "scaling.minReplicas must not exceed scaling.maxReplicas"),
        )
    )

    mode: ScalingMode = Field(
        default=ScalingMode.INTERNAL,
        description="Internal: the operator decides the number of replicas from the load. External: an autoscaler "
        "(HPA, KEDA) writes it through the scale subresource; Lorapool then only wakes the base from zero and, with "
        "minReplicas 0, scales it to zero when it is idle.",
    )
    min_replicas: int = Field(
        default=0, ge=0, le=100, description="Smallest number of replicas. 0 stops all pods of an idle base."
    )
    max_replicas: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Largest number of replicas. No more pods are run, whatever spec.replicas says.",
    )
    target_in_flight: int = Field(
        default=16, ge=1, le=10000, description="Requests in flight per replica above which another replica is started."
    )
    idle_after: Duration = Field(
        default="10m", description="A base without requests for this long is scaled down to minReplicas."
    )
    scale_down_delay: Duration = Field(
        default="2m", description="Load must stay low for this long before a replica is removed."
    )


class ColdStart(ApiModel):
    """How requests are held while no replica or slot is ready."""

    max_wait: Duration = Field(
        default="5m", description="A request that is held for this long gets 503 with Retry-After."
    )
    max_queued: int = Field(
        default=256, ge=1, le=100000, description="Requests that one gateway holds for this base; the next gets 429."
    )


class AdapterDefaults(ApiModel):
    """Defaults for LoraAdapters of this base that leave the field out."""

    idle_after: Duration = Field(
        default="5m", description="An adapter without requests for this long is unloaded from the device."
    )
    min_replicas: int = Field(
        default=0, ge=0, le=100, description="Replicas on which an adapter stays loaded even when it is idle."
    )
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Largest number of replicas over which the requests of one adapter are spread. Default: all.",
    )


class PrefixSharing(StrEnum):
    """Which callers share computed beginnings of prompts. Adapters never share them with each other or the base."""

    TENANT = "Tenant"
    """Those of one API key."""
    BASE = "Base"
    """All, so that any of them may notice that another one sent the same beginning."""


class PrefixCache(ApiModel):
    """How computed beginnings of prompts are used again."""

    sharing: PrefixSharing = Field(
        default=PrefixSharing.TENANT,
        description="Tenant: only requests with keys of one owner share them, so that no caller learns, by usage or "
        "time, what another one sends. Base: all requests for the same weights do, which saves work where they begin "
        "alike.",
    )


class Guests(ApiModel):
    """What the adapters of other namespaces may do to this base."""

    keep_awake: bool = Field(
        default=False,
        description="Whether minReplicas of a guest's adapter keeps the base running, and starts replicas. Without it "
        "such an adapter is only pinned while the base runs anyway.",
    )
    max_replicas: int = Field(
        default=1,
        ge=1,
        le=100,
        description="With keepAwake: largest number of replicas that guests' adapters keep running.",
    )


class SourceGrant(ApiModel):
    """Sources that a guest may read with the rights of the base's owner."""

    namespace: Namespace = Field(description="A namespace of spec.access.namespaces.")
    prefixes: list[SourcePrefix] = Field(
        min_length=1,
        max_length=32,
        description="Sources below these, such as pvc://models/team-b/ or s3://models/team-b/, are read with the "
        "credentials and volumes of the base. Whole parts of a path are compared.",
    )


class Access(ApiModel):
    """Which other namespaces may use this base."""

    namespaces: list[Namespace] = Field(
        default_factory=list,
        max_length=256,
        description='Other namespaces whose LoraAdapters may use this base. They are listed by name; "*" is refused.',
    )
    guests: Guests = Field(default_factory=Guests)
    sources: list[SourceGrant] = Field(
        default_factory=list,
        max_length=256,
        description="What the adapters of other namespaces may read with the rights of this base's owner: its volumes "
        "and private repositories. Without an entry a guest uses public sources and its own credentials.",
    )


class TuningDefaults(ApiModel):
    """Defaults for FineTuneJobs of this base that leave the field out."""

    rank: int = Field(default=8, ge=1, le=256, description="Rank of the adapter's matrices.")
    learning_rate: str = Field(
        default="1e-4",
        max_length=24,
        pattern=DECIMAL_PATTERN,
        description='Largest learning rate, as text such as "1e-3". Small bases take larger ones.',
    )


class FineTuning(ApiModel):
    """Whether and how FineTuneJobs train adapters on this base."""

    enabled: bool = Field(
        default=False,
        description="True lets the namespaces that may use the base train on it. A trainer is a pod of its own with "
        "its own copy of the base; it runs only while there are jobs.",
    )
    profile: str | None = Field(
        default=None,
        min_length=1,
        max_length=63,
        description="Name of the profile in the chart's runtimeProfiles for the trainer's pod. Default: that of the "
        "base's runtimes.",
    )
    max_jobs: int = Field(
        default=8, ge=1, le=64, description="Jobs that train on one copy of the base at the same time; others wait."
    )
    max_rank: int | None = Field(
        default=None, ge=1, le=256, description="Largest rank that is trained. Default: lora.maxRank, which is served."
    )
    tokens_per_cycle: int = Field(
        default=2048,
        ge=16,
        le=1048576,
        description="Tokens of all jobs that are computed together. More need more memory for activations.",
    )
    defaults: TuningDefaults = Field(default_factory=TuningDefaults)
    idle_after: Duration = Field(
        default="2m", description="A trainer without work for this long ends, and its pod with it."
    )


class BaseModelSpec(ApiModel):
    """The desired state of a BaseModel."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.source == oldSelf.source", "source is immutable: create a new BaseModel for other weights"),
            rule(
                "!has(self.fineTuning.maxRank) || self.fineTuning.maxRank <= self.lora.maxRank",
                "fineTuning.maxRank must not exceed lora.maxRank: a larger adapter could not be served",
            ),
            rule(
                "double(self.fineTuning.defaults.learningRate) > 0.0",
                "fineTuning.defaults.learningRate must be above 0",
            ),
            rule(
                "!has(self.servedName) || !self.servedName.contains('/')",
                "servedName must not contain a slash: that is a full name",
            ),
        )
    )

    source: BaseSource
    served_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$",
        description="Additional model name of the base itself for clients, without a slash. It is unique among the "
        "models of the namespace: the first object to claim it keeps it; others have the condition NameConflict.",
    )
    dtype: DType = DType.AUTO
    max_model_len: int = Field(
        default=2048, ge=16, le=1048576, description="Largest number of prompt and completion tokens of one request."
    )
    lora: BaseLora = Field(default_factory=BaseLora)
    runtime_profile: str = Field(
        default="default",
        min_length=1,
        max_length=63,
        description="Name of a profile in the chart's runtimeProfiles: resources, image and scheduling of pods.",
    )
    replicas: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Desired replicas, written through the scale subresource by operator, gateway and autoscalers. "
        "Leave it out of manifests. A number above scaling.maxReplicas counts as maxReplicas.",
    )
    paused: bool = Field(
        default=False,
        description="True keeps the running pods as they are when a change of this object, of its profile or of the "
        "release would replace them. Their number still follows scaling, and pods that end are started again.",
    )
    scaling: Scaling = Field(default_factory=Scaling)
    cold_start: ColdStart = Field(default_factory=ColdStart)
    adapter_defaults: AdapterDefaults = Field(default_factory=AdapterDefaults)
    access: Access = Field(default_factory=Access)
    fine_tuning: FineTuning = Field(default_factory=FineTuning)
    prefix_cache: PrefixCache = Field(default_factory=PrefixCache)
    chat_template: BaseChatTemplate | None = Field(
        default=None,
        description="How conversations are written for the base, and for its adapters without a template of their "
        "own. Default: with the template in the base's files.",
    )
    generation: Generation | None = Field(
        default=None, description="How answers of the base end. Default: as its files say."
    )


class AdapterCounts(ApiModel):
    """Numbers of LoraAdapters that refer to this base."""

    total: int = 0
    """Adapters in any state."""
    ready: int = 0
    """Adapters that requests may use, loaded or not."""
    loaded: int = 0
    """Adapters that are loaded on at least one replica."""
    failed: int = 0
    """Adapters with a failure of their source, their files or their load."""


class PodStatus(ApiModel):
    """One runtime pod of the base."""

    name: str = Field(max_length=253, description="Name of the pod.")
    uid: str = Field(max_length=64, description="Uid of the pod.")
    boot_id: str | None = Field(
        default=None, max_length=64, description="Identifier of the runtime process; it changes with every restart."
    )
    ready: bool = False
    """Whether the runtime reports that it serves requests."""
    draining: bool = False
    """Whether the runtime reports that it is shutting down."""


class StartStatus(ApiModel):
    """The attempts to start a replica since one served last."""

    since: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="When the present attempt began. Absent between attempts.",
    )
    failures: int = 0
    """Attempts in a row that failed with this configuration."""
    reason: str | None = Field(default=None, max_length=64, description="Why the last attempt failed.")
    message: str | None = Field(
        default=None, max_length=1024, description="Details of the failure, in the words of the cluster."
    )
    failed_at: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="When the last attempt failed.",
    )
    retry_at: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="The next attempt begins with the first request after this time, or at once when the spec or the "
        "runtime profile changes.",
    )
    configuration: str | None = Field(
        default=None, max_length=64, description="Hash of the pods' configuration that failed."
    )
    phase: str | None = Field(
        default=None, max_length=16, description="What the runtime is doing: fetching or loading the base's files."
    )
    fetched_bytes: int | None = None
    """Bytes of the base's files that the runtime has on disk."""
    total_bytes: int | None = None
    """Size of the base's files."""
    bytes_per_second: int | None = None
    """Rate of the download."""
    observed_at: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="When the progress was observed; it is written every 10 seconds at most.",
    )


class BaseModelStatus(ApiModel):
    """The observed state of a BaseModel."""

    observed_generation: int | None = None
    """The metadata.generation that this status describes."""
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="SourceResolved, RuntimeAvailable, Ready and Progressing; Reconciling or Stalled while "
        "one of them applies.",
    )
    replicas: int = 0
    """Pods that exist and are not terminating."""
    ready_replicas: int = 0
    """Pods whose runtime serves requests."""
    selector: str | None = Field(
        default=None, max_length=512, description="Label selector of the pods, for the scale subresource."
    )
    served_name: str | None = Field(
        default=None, max_length=128, description="The value of spec.servedName while the base has that model name."
    )
    revision: str | None = Field(
        default=None, max_length=256, description="Immutable revision to which the source was resolved."
    )
    digest: str | None = Field(default=None, max_length=80, description="Digest of the base's files.")
    state: str | None = Field(
        default=None, max_length=64, description="Reason of the Ready condition, for the STATE column."
    )
    adapters: AdapterCounts = Field(default_factory=AdapterCounts)
    chat: ChatReport | None = Field(
        default=None, description="The chat template and stop tokens of the base, as its runtimes report them."
    )
    pods: list[PodStatus] = Field(default_factory=list, max_length=100, description="The runtime pods.")
    modules: BaseModules | None = Field(
        default=None,
        description="What adapters may name in the base, as the first runtime that served it reported. Absent before: "
        "adapters are then not checked against the base.",
    )
    start: StartStatus | None = Field(
        default=None, description="The attempts to start a replica since one served last; absent while one serves."
    )
    last_used: str | None = Field(
        default=None,
        max_length=64,
        json_schema_extra={"format": "date-time"},
        description="When a request for the base or any of its adapters was last accepted or ended.",
    )
