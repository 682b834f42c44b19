"""What gateway and operator say to a runtime, and what it answers: JSON over HTTP.

Runtime serves it, gateway and operator call it; both parse with these models, so a field exists
once. Bearer token on every route but `/healthz` and `/readyz`.
"""

from __future__ import annotations

import hashlib
import hmac
from enum import StrEnum

from pydantic import ConfigDict, Field

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.common import DIGEST_PATTERN, ApiModel, duration_s
from lorapool_api.loraadapter import LoraAdapterSpec, UsagePart

RUNTIME_PORT = 8000

ROUTE_RUNTIME = "/v1/runtime"
ROUTE_ADAPTER = "/v1/adapters/{uid}/{digest}"
ROUTE_RESOLVE = "/v1/resolve"
ROUTE_EVENTS = "/v1/events"
ROUTE_CHAT = "/v1/chat/completions"
ROUTE_COMPLETIONS = "/v1/completions"
ROUTE_MODELS = "/v1/models"
ROUTE_HEALTH = "/healthz"
ROUTE_READY = "/readyz"
ROUTE_METRICS = "/metrics"

LONG_POLL_MAX_S = 30.0

USAGE_COMMENT = b": lorapool-usage "
"""Start of the SSE comment line that carries cumulative `Usage` JSON before each data event on the internal hop."""

ENV_TOKEN_SHA256 = "LORAPOOL_TOKEN_SHA256"


def runtime_token(master: str, base_uid: str) -> str:
    """The bearer token of one base's runtimes: hex HMAC-SHA256 of the base's uid under the release's master token."""
    return hmac.new(master.encode(), f"lorapool-runtime/{base_uid}".encode(), hashlib.sha256).hexdigest()


def token_sha256(token: str) -> str:
    """What a runtime is given to check a bearer token with; a token of 256 random bits cannot be found from it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tier(StrEnum):
    """Where the best copy of an adapter lies on a replica."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    SOURCE = "source"


class AdapterState(StrEnum):
    REGISTERED = "registered"
    LOADING = "loading"
    LOADED = "loaded"
    DRAINING = "draining"
    FAILED = "failed"


class SourceRef(ApiModel):
    uri: str = Field(min_length=7, max_length=512)
    revision: str | None = Field(default=None, max_length=256)
    """The resolved, immutable revision where the source has one."""


class AdapterDescriptor(ApiModel):
    """Body of `PUT /v1/adapters/{uid}/{digest}`: all a replica needs to load it by itself, at any later time."""

    display: str = Field(max_length=160)
    """`namespace/name`, for logs, metrics and the model list."""
    names: list[str] = Field(default_factory=list, max_length=8)
    """Further model names, used only when a request carries no adapter header."""
    source: SourceRef
    max_bytes: int | None = Field(default=None, ge=1)
    idle_after_s: float = Field(default=300.0, ge=0)
    """Unused for this long: leaves the device."""
    pinned: bool = False
    """Loaded at once and never evicted (minReplicas > 0 and this replica is its home)."""
    load: bool = False
    """Load now, without waiting for a request."""


class ErrorDetail(ApiModel):
    reason: str = Field(max_length=64)
    """A `FailureReason` value."""
    message: str = Field(max_length=1024)
    retry_at_unix_s: float | None = None
    """Absent: terminal for this digest."""
    attempts: int = 1


class AdapterReport(ApiModel):
    uid: str
    digest: str
    display: str
    state: AdapterState
    tier: Tier
    in_flight: int = 0
    waiting: int = 0
    pinned: bool = False
    rank: int | None = None
    device_bytes: int = 0
    host_bytes: int = 0
    since_unix_s: float
    """When it entered this tier."""
    last_used_unix_s: float | None = None
    failure: ErrorDetail | None = None
    usage: UsagePart
    """Counted by this process since its start, for this uid over all its digests."""


class BaseReport(ApiModel):
    served_name: str
    digest: str | None = None
    max_model_len: int
    dtype: str


class RuntimeSnapshot(ApiModel):
    """Answer of `GET /v1/runtime?after=SEQ&wait=S`: at once when seq > SEQ, else after a change or S seconds."""

    seq: int
    boot_id: str
    """New for every process."""
    started_unix_s: float
    base: BaseReport
    ready: bool
    draining: bool = False
    slots_total: int
    slots_used: int
    max_rank: int
    device_bytes: int = 0
    host_bytes: int = 0
    in_flight: int = 0
    waiting: int = 0
    kv_usage: float = Field(default=0.0, ge=0, le=1)
    last_request_unix_s: float | None = None
    """Last time any request, base's or adapter's, was accepted or ended."""
    adapters: list[AdapterReport] = Field(default_factory=list)

    def adapter(self, uid: str, digest: str) -> AdapterReport | None:
        return next((item for item in self.adapters if item.uid == uid and item.digest == digest), None)


class PutAnswer(ApiModel):
    boot_id: str
    adapter: AdapterReport


class DeleteAnswer(ApiModel):
    boot_id: str
    freed_device_bytes: int
    freed_host_bytes: int
    usage: UsagePart


class ResolveRequest(ApiModel):
    """Body of `POST /v1/resolve`: judge a source that only a runtime can read (pvc://). Loads nothing."""

    source: SourceRef
    digest: str | None = Field(default=None, pattern=DIGEST_PATTERN)
    max_bytes: int | None = None


class ResolveAnswer(ApiModel):
    digest: str | None = None
    revision: str | None = None
    rank: int | None = None
    target_modules: list[str] = Field(default_factory=list)
    size_bytes: int | None = None
    failure: ErrorDetail | None = None


class EventType(StrEnum):
    LOADED = "loaded"
    UNLOADED = "unloaded"
    LOAD_FAILED = "load_failed"


class RuntimeEvent(ApiModel):
    """One line of residency; `boot_id:seq` identifies it, so double delivery is harmless."""

    seq: int
    type: EventType
    uid: str
    digest: str
    display: str
    at_unix_s: float
    seconds: float = 0.0
    """Duration of the load, or of the residency that ended."""
    device_bytes: int = 0
    reason: str | None = None


class EventsAnswer(ApiModel):
    boot_id: str
    first_seq: int
    """Oldest event still kept; a reader that asked for less has missed some."""
    next_seq: int
    events: list[RuntimeEvent]


class Usage(ApiModel):
    """Cumulative tokens of one request (snake_case on the wire, as in OpenAI's usage object)."""

    model_config = ConfigDict(alias_generator=None)

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


DEFAULT_MAX_ADAPTER_BYTES = 4 * 2**30


def descriptor_of(
    *,
    namespace: str,
    name: str,
    spec: LoraAdapterSpec,
    base: BaseModelSpec,
    revision: str | None,
    pinned: bool = False,
    load: bool = False,
) -> AdapterDescriptor:
    """The descriptor operator and gateway both send for an adapter; alike by construction."""
    idle_after = spec.idle_after if spec.idle_after is not None else base.adapter_defaults.idle_after
    return AdapterDescriptor(
        display=f"{namespace}/{name}",
        names=[name, *([spec.alias] if spec.alias else [])],
        source=SourceRef(uri=spec.source.uri, revision=revision or spec.source.revision),
        max_bytes=DEFAULT_MAX_ADAPTER_BYTES,
        idle_after_s=duration_s(idle_after),
        pinned=pinned,
        load=load,
    )
