"""Names that several processes share, and the small value types of the objects.

Labels, annotations, headers, condition types, reasons and failure reasons are defined here once. Pure.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "lorapool.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

FIELD_MANAGER = "lorapool-operator"
"""Field manager of every server-side apply and status write of the operator."""


# --- labels, annotations -----------------------------------------------------------------

LABEL_NAME = "app.kubernetes.io/name"
LABEL_INSTANCE = "app.kubernetes.io/instance"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"

LABEL_BASE = f"{GROUP}/base"
"""On Deployments, their ReplicaSets and pods, and Services: the BaseModel's name. Labels prove nothing: `ownership`."""
LABEL_BASE_UID = f"{GROUP}/base-uid"
"""On the same objects: the BaseModel's uid, so that a recreated base never adopts pods of the deleted one."""
LABEL_GROUP_SET = "leaderworkerset.sigs.k8s.io/name"
"""On the pods and StatefulSets of a LeaderWorkerSet, set by its controller: the LeaderWorkerSet's name."""
LABEL_GROUP_INDEX = "leaderworkerset.sigs.k8s.io/group-index"
"""On its pods: the number of their group, from 0."""
LABEL_WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
"""On its pods: the number of the pod in its group; 0 is the leader, which alone answers requests."""
LABEL_API_KEY = f"{GROUP}/api-key"
"""On Secrets in the keys namespace: "true" marks an API key of the gateway."""

LABEL_SOURCE_CREDENTIALS = f"{GROUP}/source-credentials"
"""On a Secret: "true" lets the operator read it as its namespace's own credentials for artifact sources."""

ANNOTATION_RETRY = f"{GROUP}/retry"
"""On a LoraAdapter: any new value makes the operator check an adapter with a terminal failure again."""
ANNOTATION_DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""On runtime pods, defined by Kubernetes: of several pods, the one with the lowest value is stopped first."""
ANNOTATION_TEMPLATE_HASH = f"{GROUP}/template-hash"
"""On runtime pods: hash of the template that they were made from, which identifies pods of an old one."""
ANNOTATION_SPEC_HASH = f"{GROUP}/spec-hash"
"""On children: hash of the applied manifest, so that an unchanged child is not applied again."""


# --- HTTP headers ------------------------------------------------------------------------

HEADER_ADAPTER = "x-lorapool-adapter"
"""To the runtime: `<uid>@<digest>` or `base`. To the client: `<namespace>/<name>@<digest>` or `base`."""
HEADER_USAGE = "x-lorapool-usage"
"""Request value "1": the runtime reports usage on every chunk. On a JSON response: the usage."""
HEADER_ATTEMPT = "x-lorapool-attempt"
"""To the runtime: an id that no other request has, under which the gateway can cancel this one."""
HEADER_REQUEST_ID = "x-request-id"
HEADER_COLD_START = "x-lorapool-cold-start-ms"
"""To the client: milliseconds for which the request was held or waited for its adapter's load; absent when 0."""
HEADER_PROCESSING_MS = "openai-processing-ms"
HEADER_RELAXED = "x-lorapool-relaxed"
"""To the client: the keywords of the request's JSON schemas that are not enforced, separated by commas; absent when all
are."""
BASE_TARGET = "base"
"""Value of HEADER_ADAPTER for a request to the base itself."""


# --- conditions --------------------------------------------------------------------------


class BaseCondition(StrEnum):
    """Condition types of a BaseModel."""

    SOURCE_RESOLVED = "SourceResolved"
    RUNTIME_AVAILABLE = "RuntimeAvailable"
    READY = "Ready"
    PROGRESSING = "Progressing"
    NAME_CONFLICT = "NameConflict"
    """Present and True only while another object has the model name in spec."""
    RECONCILING = "Reconciling"
    """Present and True only while something changes (kstatus)."""
    STALLED = "Stalled"
    """Present and True only while nothing will change by itself (kstatus)."""


class AdapterCondition(StrEnum):
    """Condition types of a LoraAdapter."""

    RESOLVED = "Resolved"
    COMPATIBLE = "Compatible"
    LOADED = "Loaded"
    READY = "Ready"
    PROGRESSING = "Progressing"
    NAME_CONFLICT = "NameConflict"
    """Present and True only while another object has the model name in spec."""
    OUTDATED = "Outdated"
    """Present and True only while the source holds other files than those that are served."""
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class Reason(StrEnum):
    """Reasons of conditions. Failures of a source have a `FailureReason` instead."""

    RESOLVED = "Resolved"
    COMPATIBLE = "Compatible"
    NOT_CHECKED = "NotChecked"
    """No runtime of the base has run yet, so that its modules are not known."""
    PENDING = "Pending"
    """Not checked yet."""
    AWAITING_RUNTIME = "AwaitingRuntime"
    """Only a runtime can read this source and none is running; a request starts one."""
    BASE_NOT_FOUND = "BaseNotFound"
    BASE_NOT_READY = "BaseNotReady"
    NOT_PERMITTED = "NotPermitted"
    """The BaseModel does not list the adapter's namespace."""
    NAME_CONFLICT = "NameConflict"
    SUSPENDED = "Suspended"
    PARKED = "Parked"
    """Unloaded because it is idle; the next request loads it."""
    PIN_REFUSED = "PinRefused"
    """The base's owner does not allow to pin the adapter on as many replicas as its minReplicas asks for."""
    LOADING = "Loading"
    LOADED = "Loaded"
    RUNTIME_RESTARTED = "RuntimeRestarted"
    """The runtime that had loaded the adapter is gone or was restarted."""
    ROLLOUT_FAILED = "RolloutFailed"
    SCALED_TO_ZERO = "ScaledToZero"
    STARTING = "Starting"
    AVAILABLE = "Available"
    DEGRADED = "Degraded"
    UNAVAILABLE = "Unavailable"
    READY = "Ready"
    STABLE = "Stable"
    PROFILE_NOT_PERMITTED = "ProfileNotPermitted"
    """The profile in spec.runtimeProfile is not for this namespace."""
    PAUSED = "Paused"
    """spec.paused keeps the running pods as they are."""
    ROLLOUT_WAITING = "RolloutWaiting"
    """Pods are to be replaced once other bases have replaced theirs."""
    PROFILE_NOT_FOUND = "ProfileNotFound"
    """The chart's values have no profile with the name in spec.runtimeProfile."""
    PROFILES_UNREADABLE = "ProfilesUnreadable"
    """The chart's runtime profiles cannot be read; the last ones that could be stay in force."""
    UNVERIFIED = "Unverified"
    """Only a runtime can read the source, none is running, and nothing is known to be wrong."""
    ALIAS_TAKEN = "AliasTaken"
    NAME_RESERVED = "NameReserved"
    """A name with a slash is a full name, `namespace/name`."""
    SOURCE_CHANGED = "SourceChanged"
    UNREADABLE = "Unreadable"
    """This version of the operator cannot parse the object."""
    # why a base does not start
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CRASH_LOOPING = "CrashLooping"
    OUT_OF_MEMORY = "OutOfMemory"
    CONTAINER_FAILED = "ContainerFailed"
    EVICTED = "Evicted"
    UNSCHEDULABLE = "Unschedulable"
    START_TIMEOUT = "StartTimeout"
    QUOTA_EXCEEDED = "QuotaExceeded"
    INVALID_PROFILE = "InvalidProfile"
    GPU_COUNT_MISMATCH = "GPUCountMismatch"
    SHARED_MEMORY_TOO_SMALL = "SharedMemoryTooSmall"
    SHARED_MEMORY_FULL = "SharedMemoryFull"
    ADAPTERS_NOT_SHARED = "AdaptersNotShared"
    BASE_UNSUPPORTED = "BaseUnsupported"
    """The engine of the profile does not compute this base."""
    DEVICE_UNUSABLE = "DeviceUnusable"
    """The GPU, or what is needed to use it, is missing or too old."""
    DEVICE_MEMORY_TOO_SMALL = "DeviceMemoryTooSmall"
    """Base, adapters and KV cache do not fit on the GPUs."""
    GROUP_ENDED = "GroupEnded"
    """A runtime of a group lost another one, or does not fit to it."""
    ENGINE_REFUSED = "EngineRefused"
    """The engine cannot start with these settings, or in the version that is installed."""
    LEADER_WORKER_SET_MISSING = "LeaderWorkerSetMissing"
    """The cluster does not serve the API of LeaderWorkerSets."""
    WORKER_LOST = "WorkerLost"
    """Kubernetes ends a pod of a group, so that the whole group starts again."""
    APPLY_REFUSED = "ApplyRefused"
    """The API server refuses to create or change an object of the base."""
    TOKEN_REFUSED = "TokenRefused"
    """A runtime does not accept the operator's token."""
    CERTIFICATE_REFUSED = "CertificateRefused"
    """The operator does not accept a runtime's certificate."""


class FailureReason(StrEnum):
    """Why an artifact cannot be served. Each reason is either transient or terminal, see `transient`."""

    # terminal: not retried until the spec or the retry annotation changes, but for those in `repeated`
    SOURCE_NOT_FOUND = "SourceNotFound"
    UNAUTHORIZED = "Unauthorized"
    INVALID_SOURCE = "InvalidSource"
    SOURCE_NOT_PERMITTED = "SourceNotPermitted"
    UNSUPPORTED_FORMAT = "UnsupportedFormat"
    TOO_LARGE = "TooLarge"
    CORRUPT_ARTIFACT = "CorruptArtifact"
    DIGEST_MISMATCH = "DigestMismatch"
    INCOMPATIBLE = "Incompatible"
    WRONG_BASE = "WrongBase"
    RANK_TOO_HIGH = "RankTooHigh"
    NON_FINITE_WEIGHTS = "NonFiniteWeights"
    # transient: retried at `retryAt`
    SOURCE_UNAVAILABLE = "SourceUnavailable"
    SOURCE_TIMEOUT = "SourceTimeout"
    RATE_LIMITED = "RateLimited"
    NO_CAPACITY = "NoCapacity"
    DISK_FULL = "DiskFull"
    LOAD_FAILED = "LoadFailed"
    CLAIM_NOT_MOUNTED = "ClaimNotMounted"

    @property
    def transient(self) -> bool:
        """Whether another attempt may succeed without any change."""
        return self in _TRANSIENT

    @property
    def repeated(self) -> bool:
        """Whether the source is inspected again without a change of the object. A missing artifact may still be
        uploaded, and access may still be granted."""
        return self.transient or self in (FailureReason.SOURCE_NOT_FOUND, FailureReason.UNAUTHORIZED)

    @property
    def code(self) -> str:
        """The `code` in OpenAI's error format, such as `rank_too_high`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.value).lower()


_TRANSIENT = frozenset(
    {
        FailureReason.SOURCE_UNAVAILABLE,
        FailureReason.SOURCE_TIMEOUT,
        FailureReason.RATE_LIMITED,
        FailureReason.NO_CAPACITY,
        FailureReason.DISK_FULL,
        FailureReason.LOAD_FAILED,
        FailureReason.CLAIM_NOT_MOUNTED,
    }
)


# --- value types -------------------------------------------------------------------------

_DURATION = re.compile(r"^(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?$")
DURATION_PATTERN = r"^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$"

Duration = Annotated[
    str,
    Field(
        min_length=2,
        max_length=24,
        pattern=DURATION_PATTERN,
        description='Duration such as "90s", "5m" or "1h30m".',
    ),
]


def duration_s(value: str) -> float:
    """Seconds of a duration such as `1h30m`. Raises ValueError for any other text."""
    match = _DURATION.match(value)
    if not value or match is None:
        raise ValueError(f'not a duration: {value!r}; write it like "90s", "5m" or "1h30m"')
    hours, minutes, seconds = (int(part) if part else 0 for part in match.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


_QUANTITY = re.compile(r"^(\d+)(Ki|Mi|Gi|Ti|k|M|G|T)?$")
QUANTITY_PATTERN = r"^[0-9]{1,15}(Ki|Mi|Gi|Ti|k|M|G|T)?$"
_UNITS = {None: 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

Quantity = Annotated[
    str,
    Field(
        min_length=1,
        max_length=20,
        pattern=QUANTITY_PATTERN,
        description='Bytes as a Kubernetes quantity, such as "512Mi".',
    ),
]


def quantity_bytes(value: str) -> int:
    """Bytes of a quantity such as `512Mi`. Raises ValueError for any other text."""
    match = _QUANTITY.match(value)
    if match is None:
        raise ValueError(f'not a quantity of bytes: {value!r}; write it like "512Mi" or "2Gi"')
    return int(match[1]) * _UNITS[match[2]]


DECIMAL_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,12})?([eE][-+]?[0-9]{1,2})?$"
"""A number of 0 or more as text, such as 0.1 or 1e-3."""

DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of an artifact: name relative to its root, size and content hash."""

    name: str
    size_bytes: int
    sha256: str


def artifact_digest(files: Iterable[FileDigest]) -> str:
    """The identity of an artifact: `sha256:…` of the names, sizes and hashes of its files, in any order."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda item: item.name):
        total.update(f"{file.name}\0{file.size_bytes}\0{file.sha256}\n".encode())
    return f"sha256:{total.hexdigest()}"


class AdapterKey(NamedTuple):
    """The identity of an adapter's weights: the object's uid and the digest of its files."""

    uid: str
    digest: str

    def __str__(self) -> str:
        return f"{self.uid}@{self.digest}"

    @classmethod
    def parse(cls, text: str) -> AdapterKey:
        """Parses `<uid>@sha256:<hex>`. Raises ValueError."""
        uid, _, digest = text.partition("@")
        if not re.fullmatch(r"[0-9A-Za-z-]{1,63}", uid) or not re.fullmatch(DIGEST_PATTERN, digest):
            raise ValueError(f"not an adapter key: {text[:160]!r}; expected <uid>@sha256:<64 hex digits>")
        return cls(uid, digest)


# --- base of all objects -----------------------------------------------------------------


class ApiModel(BaseModel):
    """Base of all API models: camelCase in JSON, snake_case in code. Unknown fields are ignored (version skew)."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    def dump(self) -> dict[str, Any]:
        """The JSON form for the API server: camelCase, without unset optionals."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Condition(ApiModel):
    """A condition, as metav1.Condition defines it."""

    type: str = Field(max_length=64, description="Type of the condition.")
    status: str = Field(pattern="^(True|False|Unknown)$", description="True, False or Unknown.")
    observed_generation: int | None = None
    """The metadata.generation that this condition describes."""
    last_transition_time: str = Field(
        max_length=64, json_schema_extra={"format": "date-time"}, description="When the status last changed."
    )
    reason: str = Field(max_length=64, description="One of the documented reasons.")
    message: str = Field(default="", max_length=1024, description="Details and, for a failure, the remedy.")


def set_conditions(
    previous: Iterable[Condition], wanted: Mapping[str, tuple[str, str, str]], *, generation: int, now: str
) -> list[Condition]:
    """The new list of conditions for `wanted` = {type: (status, reason, message)}.

    The transition time is kept while the status is unchanged. `now` is an RFC 3339 time.
    """
    before = {condition.type: condition for condition in previous}
    result = []
    for kind, (status, reason, message) in wanted.items():
        old = before.get(kind)
        if old is not None and (old.status, old.reason, old.message, old.observed_generation) == (
            status,
            reason,
            message[:1024],
            generation,
        ):
            result.append(old)
            continue
        since = old.last_transition_time if old is not None and old.status == status else now
        result.append(
            Condition(
                type=kind,
                status=status,
                observed_generation=generation,
                last_transition_time=since,
                reason=reason,
                message=message[:1024],
            )
        )
    return result
