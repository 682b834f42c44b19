"""Runtime profiles: the settings of runtime pods that an administrator, never a tenant, decides.

They are parsed from the YAML file that the chart mounts, at start and again when it changes. A file with an unknown key
or a bad value is refused as a whole, and the profiles that were read before stay in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel, to_snake

from lorapool_api.common import Quantity


class ProfilesError(Exception):
    """The profiles file cannot be used; the message names file and field."""


Percentage = Annotated[str, Field(pattern=r"^(100|[0-9]{1,2})%$")]


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )


class ClaimVolume(_Strict):
    claim: str = Field(min_length=1, max_length=253)
    """A PersistentVolumeClaim in the BaseModel's namespace, mounted at /pvc/<claim>."""
    read_only: bool = True
    """Whether the runtime may not write to it."""


class _OneKind(_Strict):
    """A volume of exactly one kind; each is Kubernetes' own type."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len(self.model_fields_set) != 1:
            kinds = [str(field.alias) for field in type(self).model_fields.values()]
            raise ValueError(f"takes exactly one of {', '.join(kinds[:-1])} and {kinds[-1]}")
        return self


class AdapterCache(_OneKind):
    """A volume for the files of adapters that all nodes of a group mount at the same time."""

    pvc: dict[str, Any] | None = None
    """Spec of a PersistentVolumeClaim with the access mode ReadWriteMany. The operator creates one claim per BaseModel,
    which is deleted with it. Its size is shared by the base's replicas."""
    host_path: dict[str, Any] | None = None
    """A folder (`{path, type}`) of a file system that is the same on all nodes, such as NFS or Lustre."""


class ModelCache(_OneKind):
    """A volume that keeps the files of base models when a pod ends."""

    pvc: dict[str, Any] | None = None
    """Spec of a PersistentVolumeClaim. The operator creates one claim per BaseModel, which is deleted with it."""
    host_path: dict[str, Any] | None = None
    """A folder of the node (`{path, type}`), which bases may share. The user of the pod must be able to write to it,
    and the namespace must permit hostPath."""
    ephemeral: dict[str, Any] | None = None
    """`{volumeClaimTemplate}`: a volume per pod that is larger or faster than the node's disk."""


POD_FIELDS = frozenset(
    {
        "automountServiceAccountToken",
        "containers",
        "dnsConfig",
        "dnsPolicy",
        "hostAliases",
        "initContainers",
        "preemptionPolicy",
        "resourceClaims",
        "schedulerName",
        "securityContext",
        "serviceAccountName",
        "topologySpreadConstraints",
        "volumes",
    }
)
"""The fields of a PodSpec that a profile may add to; the operator writes the others."""
POLICY_FIELDS = frozenset({"ingress", "egress"})
CONTAINER_FIELDS = frozenset(
    {
        "envFrom",
        "lifecycle",
        "livenessProbe",
        "readinessProbe",
        "securityContext",
        "startupProbe",
        "volumeDevices",
        "volumeMounts",
    }
)
"""The fields of the runtime's Container that a profile may add to."""


def _only(allowed: frozenset[str]) -> AfterValidator:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(value.keys() - allowed)
        if unknown:
            raise ValueError(f"{', '.join(unknown)} cannot be set here; possible are {', '.join(sorted(allowed))}")
        return value

    return AfterValidator(check)


class Rollout(_Strict):
    """How pods are replaced. Where neither bound is set, a profile that asks for devices replaces pods in place."""

    strategy: Literal["RollingUpdate", "Recreate"] = "RollingUpdate"
    """Recreate stops all pods before it starts new ones."""
    max_surge: Annotated[int, Field(ge=0, le=100)] | Percentage | None = None
    """Pods above the wanted number that may exist meanwhile. Default: 0 with devices, else 1."""
    max_unavailable: Annotated[int, Field(ge=0, le=100)] | Percentage | None = None
    """Wanted pods that may be missing meanwhile. Default: 1 where max_surge is 0, else 0."""

    @model_validator(mode="after")
    def _possible(self) -> Rollout:
        if self.max_surge in (0, "0%") and self.max_unavailable in (0, "0%"):
            raise ValueError("maxSurge and maxUnavailable must not both be 0: no pod could be replaced")
        return self


class TrainerProfile(_Strict):
    """How the batch/v1 Jobs of trainers are queued; their pods are otherwise those of the profile."""

    suspend: bool = False
    """The Job is created suspended, and has no pod until an administrator or a queue releases it."""
    job_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the Job, such as `kueue.x-k8s.io/queue-name`; the operator's own take precedence."""
    priority_class_name: str = ""
    """PriorityClass of the pod. Empty: the one of the chart's value tuning.priorityClass, below serving."""


ENGINE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "torch": {},
    # vLLM compiles kernels and captures graphs at its start, and stores what it compiles in /tmp.
    "vllm": {"startupTimeoutSeconds": 1800, "tmpSizeLimit": "8Gi"},
}
"""Defaults of the fields that depend on the engine."""


class RuntimeProfile(_Strict):
    """One profile. Values of Kubernetes' own types are passed on unchanged."""

    allowed_namespaces: tuple[str, ...] = ()
    """Namespaces whose BaseModels may use the profile; empty: all."""
    engine: Literal["torch", "vllm"] = "torch"
    """What computes in the runtime: its own engine on torch, which uses one GPU or the CPU, or vLLM. It decides which
    of the operator's images the pods have, and defaults of other fields."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """GPUs that share each layer of the base. It needs the engine vllm and shmSizeLimit."""
    pipeline_parallel: int = Field(default=1, ge=1, le=64)
    """Parts into which the layers of the base are divided, each on tensorParallel GPUs. On one node, the product of
    both is the number of GPUs in resources.limits."""
    nodes: int = Field(default=1, ge=1, le=32)
    """Pods of one replica, each on a node of its own. Above 1 a replica is a group of a LeaderWorkerSet, which the
    cluster must have: tensorParallel is then the number of GPUs of each pod, and pipelineParallel that of nodes."""
    image: str = ""
    """Empty: the operator's image for the engine."""
    image_pull_policy: str = Field(default="", pattern="^(Always|IfNotPresent|Never)?$")
    """Empty: the chart's value for runtimes."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets in the BaseModel's namespace."""
    resources: dict[str, Any] = Field(default_factory=dict)
    """Requests, limits and claims of the runtime's container."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Kubernetes' tolerations."""
    affinity: dict[str, Any] = Field(default_factory=dict)
    """Kubernetes' affinity."""
    priority_class_name: str = ""
    """Name of a PriorityClass."""
    runtime_class_name: str = ""
    """Name of a RuntimeClass, such as nvidia."""
    env: tuple[dict[str, Any], ...] = ()
    """Kubernetes EnvVar items; with `valueFrom.secretKeyRef` the kubelet reads the Secret, not the operator."""
    volumes: tuple[ClaimVolume, ...] = ()
    """Claims for pvc:// sources."""
    cache_size_limit: Quantity = "20Gi"
    """emptyDir at /cache: adapters on disk, and the base's files unless `cache` keeps them."""
    cache: ModelCache | None = None
    """Volume at /models for the files of base models, so that a pod that starts later does not download them again.
    Files are stored by their digest, and several pods may write to it."""
    adapter_cache: AdapterCache | None = None
    """Volume for the files of adapters on which all nodes of a group find what the leader fetched; only with nodes
    above 1, and required there."""
    tmp_size_limit: Quantity = "1Gi"
    """emptyDir at /tmp. Default with the engine vllm: 8Gi."""
    shm_size_limit: Quantity | Literal[""] = ""
    """Size of a memory-backed emptyDir at /dev/shm; empty for none. Processes that share GPUs exchange data there: with
    several GPUs it is 1Gi or more. What is stored there counts as memory of the container."""
    threads: int = Field(default=0, ge=0)
    """Number of torch threads; 0 means all cores that the container may use."""
    termination_grace_period_seconds: int = Field(default=900, ge=5)
    """Running requests get this time, less 5 s, to finish. A pod that has none ends at once."""
    startup_timeout_seconds: int = Field(default=900, ge=30)
    """Time to download and load the base; after it the kubelet restarts the container. The operator gives a base up
    this long, plus the time to schedule it and to pull the image, after it was asked for. Default and least value with
    the engine vllm: 1800."""
    min_ready_seconds: int = Field(default=0, ge=0)
    """A new pod must have been ready for this long before a rollout continues."""
    pod_disruption_budget: dict[str, Any] = Field(default={"maxUnavailable": 1})
    """`maxUnavailable` or `minAvailable` of the base's PodDisruptionBudget, and further fields of its spec."""
    run_as_user: int = Field(default=10001, ge=0)
    """0: no user is asked for, and the platform assigns one (OpenShift)."""
    cloud_identity: bool = False
    """Lets the pods reach the address at which the cloud gives their service account (`pod.serviceAccountName`) an
    identity, such as 169.254.169.254. Other pods are kept from it by the NetworkPolicy."""
    network_policy: Annotated[dict[str, Any], _only(POLICY_FIELDS)] = Field(default_factory=dict)
    """`ingress` and `egress` of the NetworkPolicy of the base's pods. The chart sets them from its value networkPolicy;
    a list that is given here replaces the chart's. Empty: the operator makes no NetworkPolicy."""
    pod: Annotated[dict[str, Any], _only(POD_FIELDS)] = Field(default_factory=dict)
    """Fields of the PodSpec, merged into the operator's: maps by key, lists by appending. `containers` are sidecars. A
    topology spread constraint without a labelSelector gets the one of the base's pods."""
    container: Annotated[dict[str, Any], _only(CONTAINER_FIELDS)] = Field(default_factory=dict)
    """Fields of the runtime's container, merged likewise: `envFrom`, `volumeMounts`, thresholds of probes."""
    pod_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the pods; the operator's own take precedence."""
    pod_annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the pods."""
    rollout: Rollout = Field(default_factory=Rollout)
    """How pods are replaced when their template changes."""
    trainer: TrainerProfile = Field(default_factory=TrainerProfile)
    """How trainers are queued, where a BaseModel's fineTuning uses the profile."""

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_of_the_engine(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        engine = data.get("engine", "torch")
        defaults = ENGINE_DEFAULTS.get(engine, {}) if isinstance(engine, str) else {}
        return {**{name: value for name, value in defaults.items() if to_snake(name) not in data}, **data}

    def permits(self, namespace: str) -> bool:
        """Whether BaseModels of this namespace may use the profile."""
        return not self.allowed_namespaces or namespace in self.allowed_namespaces


Profiles = Mapping[str, RuntimeProfile]


@dataclass(frozen=True, slots=True)
class RuntimeImage:
    """The image of pods whose profile names none, and what the release asks of all pods."""

    image: str
    pull_policy: str
    keeps_usage: bool = False
    """Whether usage records are kept until the release's ledger has them."""


Images = Mapping[str, RuntimeImage]
"""By engine; torch is always there, and trainers have its image."""
NO_IMAGE = RuntimeImage("", "IfNotPresent")


class _File(_Strict):
    profiles: dict[str, RuntimeProfile]


def device_names(resources: Mapping[str, Any]) -> frozenset[str]:
    """Returns the extended resources, such as nvidia.com/gpu, that a pod with these resources takes from its node."""
    asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    return frozenset(name for name, amount in asked.items() if "/" in name and str(amount) != "0")


def gpus(resources: Mapping[str, Any]) -> int | None:
    """Returns how many GPUs a pod with these resources gets; None if claims decide it."""
    if resources.get("claims"):
        return None
    limits = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    counts = (str(amount) for name, amount in limits.items() if name.endswith("/gpu") or "/mig-" in name)
    return sum(int(count) for count in counts if count.isdecimal())


def parse_profiles(text: str, *, origin: str) -> Profiles:
    """Parses the profiles by name. Raises ProfilesError that names `origin` and the field."""
    try:
        return _File.model_validate(yaml.safe_load(text)).profiles
    except yaml.YAMLError as error:
        raise ProfilesError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ProfilesError(f"{origin}: {problems}") from error


def read_profiles(path: Path) -> Profiles:
    """Reads a file of profiles. Raises ProfilesError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfilesError(f"{path} cannot be read: {error.strerror}") from error
    return parse_profiles(text, origin=str(path))
