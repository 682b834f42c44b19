"""The runtime protocol: JSON over HTTP, between a runtime as server and gateway and operator as clients.

All three parse with these models, so that each field is defined once. Every route except `/healthz` and `/readyz`
requires the bearer token; operator and gateway poll `GET /v1/runtime` with a proof instead (`poll_proof`).
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from enum import StrEnum

from pydantic import ConfigDict, Field

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.chat import BaseChatTemplate, ChatReport, ChatTemplate, Generation, chat_hash
from lorapool_api.common import DIGEST_PATTERN, ApiModel, duration_s
from lorapool_api.loraadapter import LoraAdapterSpec, UsagePart

RUNTIME_PORT = 8000

ROUTE_RUNTIME = "/v1/runtime"
ROUTE_BASE_MODULES = "/v1/base/modules"
ROUTE_ADAPTER = "/v1/adapters/{uid}/{digest}"
ROUTE_RESOLVE = "/v1/resolve"
ROUTE_CREDENTIALS = "/v1/credentials"
ROUTE_ATTEMPT = "/v1/attempts/{id}"
ROUTE_EVENTS = "/v1/events"
ROUTE_CHAT = "/v1/chat/completions"
ROUTE_COMPLETIONS = "/v1/completions"
ROUTE_RESPONSES = "/v1/responses"
INFERENCE_ROUTES = (ROUTE_CHAT, ROUTE_COMPLETIONS, ROUTE_RESPONSES)
"""Routes that generate tokens."""
ROUTE_TOKENIZE = "/tokenize"
ROUTE_DETOKENIZE = "/detokenize"
TOKEN_ROUTES = (ROUTE_TOKENIZE, ROUTE_DETOKENIZE)
"""Routes that convert between text and tokens, as a model does."""
ROUTE_MODELS = "/v1/models"
ROUTE_OPENAPI = "/openapi.json"
ROUTE_VERSION = "/version"
ALIVE_ROUTES = ("/health", "/ping")
"""Of the gateway's API port, without a key: what clients ask before their first request."""
ROUTE_HEALTH = "/healthz"
ROUTE_READY = "/readyz"
ROUTE_METRICS = "/metrics"

HEADER_TENANT = "x-lorapool-tenant"
"""To the runtime: an opaque identifier of the caller's tenant, 1 to 64 letters and digits, so that the tenants of a
replica share it fairly. Absent: the caller is not known."""

LONG_POLL_MAX_S = 30.0

USAGE_COMMENT = b": lorapool-usage "
"""Start of the SSE comment line that carries cumulative `Usage` JSON before each data event on the internal hop."""

ENV_TOKEN_SHA256 = "LORAPOOL_TOKEN_SHA256"
ENV_TOKEN_SHA256_FILE = "LORAPOOL_TOKEN_SHA256_FILE"
"""A file with one hash per line, each of a valid bearer token; read again when it changes."""


@functools.lru_cache(maxsize=4096)
def runtime_token(master: str, base_uid: str) -> str:
    """The bearer token of one base's runtimes: hex HMAC-SHA256 of the base's uid, keyed with the master token."""
    return hmac.new(master.encode(), f"lorapool-runtime/{base_uid}".encode(), hashlib.sha256).hexdigest()


def token_sha256(token: str) -> str:
    """The hash with which a runtime checks bearer tokens; a token of 256 random bits cannot be derived from it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tier(StrEnum):
    """Where the best copy of an adapter on a replica is stored."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    SOURCE = "source"


class AdapterState(StrEnum):
    """State of a registered adapter in a runtime."""

    REGISTERED = "registered"
    LOADING = "loading"
    LOADED = "loaded"
    DRAINING = "draining"
    FAILED = "failed"


class SourceRef(ApiModel):
    """A source at one revision."""

    uri: str = Field(min_length=7, max_length=512)
    """`hf://`, `oci://`, `s3://`, `pvc://` or `store://`, as in `spec.source.uri`."""
    revision: str | None = Field(default=None, max_length=256)
    """The resolved, immutable revision where the source has one."""


class AdapterDescriptor(ApiModel):
    """Body of `PUT /v1/adapters/{uid}/{digest}`: everything that a replica needs to load the adapter at any time."""

    display: str = Field(max_length=160)
    """`namespace/name`, for logs, metrics and the model list."""
    names: list[str] = Field(default_factory=list, max_length=8)
    """Further model names, used only when a request carries no adapter header."""
    source: SourceRef
    """Where a replica fetches the files."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Larger files are refused. None: the bound of the runtime's settings."""
    idle_after_s: float = Field(default=300.0, ge=0)
    """The adapter is unloaded from the device after this long without requests."""
    pinned: bool = False
    """Load immediately and never evict (minReplicas > 0 and this is a preferred replica)."""
    load: bool = False
    """Load immediately, without waiting for a request."""
    chat_template: ChatTemplate | None = None
    """In place of the template in the files."""
    generation: Generation | None = None
    """In place of the stop tokens that the files name."""

    @property
    def chat_hash(self) -> str:
        """Identifies what the object says about chats; empty where it says nothing."""
        return chat_hash(self.chat_template, self.generation)

    @property
    def namespace(self) -> str:
        """The namespace of the adapter, which decides with whose rights its source is read."""
        return self.display.partition("/")[0]


class BaseChat(ApiModel):
    """The file `LORAPOOL_RUNTIME_CHAT_FILE`: what a BaseModel says about chats. Read again when it changes."""

    chat_template: BaseChatTemplate | None = None
    """In place of the template in the base's files."""
    generation: Generation | None = None
    """Tokens that end answers besides those that the base's files name."""


class Preload(ApiModel):
    """One adapter that a runtime loads before it is ready."""

    uid: str
    """Uid of the LoraAdapter."""
    digest: str = Field(pattern=DIGEST_PATTERN)
    """Digest of its files."""
    descriptor: AdapterDescriptor
    """As `PUT /v1/adapters/{uid}/{digest}` takes it."""


class PreloadList(ApiModel):
    """The file `LORAPOOL_RUNTIME_PRELOAD_FILE`: what the pods that a rollout replaces have loaded."""

    adapters: list[Preload] = Field(default_factory=list)
    """One a slot at most."""


class ErrorDetail(ApiModel):
    """A failure of an adapter."""

    reason: str = Field(max_length=64)
    """A `FailureReason` value."""
    message: str = Field(max_length=1024)
    """What is wrong and what to do."""
    retry_at_unix_s: float | None = None
    """Time of the next attempt; absent when the failure is terminal for this digest."""
    attempts: int = 1
    """Attempts that failed so far."""


class AdapterReport(ApiModel):
    """One registered adapter of a runtime."""

    uid: str
    """Uid of the LoraAdapter."""
    digest: str
    """Digest of its files."""
    display: str
    """`namespace/name`."""
    state: AdapterState
    """What the runtime does with the adapter."""
    tier: Tier
    """Where the fastest copy is."""
    in_flight: int = 0
    """Requests that are being computed."""
    waiting: int = 0
    """Requests that wait for the load or for the engine."""
    pinned: bool = False
    """Whether it is never evicted."""
    rank: int | None = None
    """Largest rank; absent until the files were read."""
    device_bytes: int = 0
    """Bytes on the device."""
    host_bytes: int = 0
    """Bytes in the host cache; on a CPU the same memory as the slot's."""
    since_unix_s: float
    """When the adapter entered this tier."""
    last_used_unix_s: float | None = None
    """End of its last request."""
    failure: ErrorDetail | None = None
    """Why the last load failed."""
    chat: ChatReport | None = None
    """The chat template and stop tokens in use; absent until the files were read."""
    chat_hash: str = ""
    """`AdapterDescriptor.chat_hash` of the descriptor that it has now."""
    usage: UsagePart
    """Usage of this uid with any digest, counted by this process since its start."""


class RemovedAdapter(ApiModel):
    """An adapter that is not registered any more."""

    uid: str
    """Uid of the LoraAdapter."""
    digest: str
    """Digest of its files."""


class BaseReport(ApiModel):
    """The base that a runtime serves."""

    served_name: str
    """Model name of the base."""
    digest: str | None = None
    """Digest of its files."""
    max_model_len: int
    """Tokens of prompt and completion together."""
    dtype: str
    """Type of the weights."""
    chat: ChatReport | None = None
    """The chat template and stop tokens in use; absent until the base is loaded."""


class StartupPhase(StrEnum):
    """What a runtime that does not serve yet is doing."""

    FETCHING = "fetching"
    LOADING = "loading"


class StartupReport(ApiModel):
    """How far the start of a runtime is."""

    phase: StartupPhase
    """`fetching` the base's files from their source, or `loading` them onto the device."""
    fetched_bytes: int = Field(default=0, ge=0)
    """Bytes of the base's files on disk, also those of an earlier process."""
    total_bytes: int | None = Field(default=None, ge=0)
    """Size of the base's files; absent until the source has listed them."""
    bytes_per_s: float = Field(default=0.0, ge=0)
    """Present rate of the download."""


class RuntimeSnapshot(ApiModel):
    """Response of `GET /v1/runtime?after=SEQ&boot=ID&wait=S`: sent when seq > SEQ, at the latest after S seconds.

    With the boot id of this process and the seq of the reader's last snapshot, it has only the changes since then.
    """

    seq: int
    """Increases with every change."""
    boot_id: str
    """Identifier of the runtime process."""
    started_unix_s: float
    """Start of the process."""
    ready_unix_s: float | None = None
    """When requests were first accepted; None before."""
    now_unix_s: float | None = None
    """The runtime's clock when it sent this. All times here are of that clock, which may differ from the reader's."""
    base: BaseReport
    """What is served."""
    ready: bool
    """Whether requests are accepted."""
    draining: bool = False
    """Whether the process is about to end."""
    slots_total: int
    """Adapters that fit on the device at one time."""
    slots_used: int
    """Slots that are taken."""
    max_rank: int
    """Largest rank that is served."""
    device_bytes: int = 0
    """Bytes that the engine holds on the device."""
    host_bytes: int = 0
    """Bytes of the host cache."""
    in_flight: int = 0
    """Requests that are being computed."""
    waiting: int = 0
    """Requests that wait for a load or for the engine."""
    kv_usage: float = Field(default=0.0, ge=0, le=1)
    """Used share of the KV cache."""
    last_request_unix_s: float | None = None
    """When a request for the base or any adapter was last accepted or ended."""
    full: bool = True
    """Whether `adapters` are all registered ones. Else they are those that changed since the reader's last snapshot."""
    startup: StartupReport | None = None
    """How far the start is; absent once the base is loaded."""
    adapters: list[AdapterReport] = Field(default_factory=list)
    """The adapters that are reported."""
    removed: list[RemovedAdapter] = Field(default_factory=list)
    """The adapters that were removed since; to be applied before `adapters`. Empty if `full`."""

    def adapter(self, uid: str, digest: str) -> AdapterReport | None:
        """The report of one adapter, or None when it is not registered."""
        return next((item for item in self.adapters if item.uid == uid and item.digest == digest), None)


class PutAnswer(ApiModel):
    """Response of `PUT /v1/adapters/{uid}/{digest}`."""

    boot_id: str
    """Identifier of the runtime process."""
    adapter: AdapterReport
    """Its state after the registration."""


class DeleteAnswer(ApiModel):
    """Response of `DELETE /v1/adapters/{uid}/{digest}`."""

    boot_id: str
    """Identifier of the runtime process."""
    freed_device_bytes: int
    """Bytes freed on the device."""
    freed_host_bytes: int
    """Bytes freed in the host cache."""
    usage: UsagePart
    """The last usage of this uid in this process."""


class ResolveRequest(ApiModel):
    """Body of `POST /v1/resolve`: checks a source that only a runtime can read (pvc://) without loading it."""

    source: SourceRef
    """The source to check."""
    namespace: str = Field(default="", max_length=63)
    """The namespace of the object that names the source, which decides with whose rights it is read."""
    digest: str | None = Field(default=None, pattern=DIGEST_PATTERN)
    """Expected digest; other files are a failure."""
    max_bytes: int | None = None
    """Larger files are refused. None: the bound of the runtime's settings."""


class ResolveAnswer(ApiModel):
    """Response of `POST /v1/resolve`; `failure` is set when the source cannot be used."""

    digest: str | None = None
    """Digest of the files."""
    weights_digest: str | None = None
    """Digest of the weights and their config alone, without what an adapter brings for chats."""
    revision: str | None = None
    """The resolved, immutable revision."""
    rank: int | None = None
    """Largest rank."""
    target_modules: list[str] = Field(default_factory=list)
    """Modules that the adapter changes."""
    size_bytes: int | None = None
    """Size of the files."""
    failure: ErrorDetail | None = None
    """Why the source cannot be used."""


class NamespaceCredentials(ApiModel):
    """Body of `PUT /v1/credentials`: the own credentials of namespaces for their sources, in place of all before.

    A runtime keeps them in memory only. A namespace without any has an empty entry.
    """

    namespaces: dict[str, dict[str, str]] = Field(default_factory=dict, repr=False)
    """By namespace, the credentials by the names of their variables, such as HF_TOKEN."""


class EventType(StrEnum):
    """What happened to an adapter."""

    LOADED = "loaded"
    UNLOADED = "unloaded"
    LOAD_FAILED = "load_failed"


class RuntimeEvent(ApiModel):
    """A change of an adapter's residency. `boot_id:seq` identifies it, so that double delivery is harmless."""

    seq: int
    """Number within this process."""
    type: EventType
    """What happened."""
    uid: str
    """Uid of the LoraAdapter."""
    digest: str
    """Digest of its files."""
    display: str
    """`namespace/name`."""
    at_unix_s: float
    """When it happened."""
    seconds: float = 0.0
    """Duration of the load, or of the residency that ended."""
    device_bytes: int = 0
    """Bytes loaded or freed on the device."""
    reason: str | None = None
    """Why the load failed."""


class EventsAnswer(ApiModel):
    """Response of `GET /v1/events?after=SEQ&wait=S`."""

    boot_id: str
    """Identifier of the runtime process."""
    first_seq: int
    """Oldest event still kept. A reader whose SEQ is older has missed events."""
    next_seq: int
    """SEQ for the next request."""
    events: list[RuntimeEvent]
    """The events after the requested one, oldest first."""


class Usage(ApiModel):
    """Cumulative tokens of one request (snake_case on the wire, as in OpenAI's usage object)."""

    model_config = ConfigDict(alias_generator=None)

    prompt_tokens: int
    """Tokens of the prompt, cached ones included."""
    completion_tokens: int
    """Generated tokens."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again."""


class RequestOutcome(StrEnum):
    """How an admitted request ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


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
    """The descriptor of an adapter. Operator and gateway both use it, so that they send the same."""
    idle_after = spec.idle_after if spec.idle_after is not None else base.adapter_defaults.idle_after
    return AdapterDescriptor(
        display=f"{namespace}/{name}",
        names=[name, *([spec.alias] if spec.alias else [])],
        source=SourceRef(uri=spec.source.uri, revision=revision or spec.source.revision),
        idle_after_s=duration_s(idle_after),
        pinned=pinned,
        load=load,
        chat_template=spec.chat_template,
        generation=spec.generation,
    )
