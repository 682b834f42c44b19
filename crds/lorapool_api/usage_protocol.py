"""The usage protocol: what runtimes and gateways record of every request, and how the ledger collects it.

Gateway and runtime write their halves under one attempt id; the ledger joins them. Every record has a number within its
process (`boot_id:seq`), so that double delivery is harmless. A record is kept by its writer until the ledger has
committed it. All times are whole milliseconds or seconds since 1970 of the writer's clock, all durations whole
nanoseconds, all counts whole numbers: sums are exact.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lorapool_api.common import ApiModel
from lorapool_api.pod_address import server_name
from lorapool_api.protocol import RequestOutcome

ROUTE_USAGE = "/v1/usage"
"""Of a runtime. `GET ?boot=ID&after=SEQ&wait=S` returns a `UsagePage`; `DELETE ?boot=ID&through=SEQ` acknowledges."""
ROUTE_ATTEMPTS = "/v1/attempts"
"""Of the ledger. `POST` of a `GatewayBatch` by a gateway returns a `BatchAnswer` once it is committed."""

HEADER_KEY = "x-lorapool-key"
"""To the runtime: uid of the Secret of the API key. A gateway sets it and drops what a client sent."""
HEADER_PROJECT = "x-lorapool-project"
"""To the runtime: the namespace that pays. A gateway sets it and drops what a client sent."""

LEDGER_PORT = 8000
LEDGER_SERVER_NAME = server_name("ledger")
"""The name in the certificate of the ledger."""

PAGE_RECORDS = 1000
"""Records of one `UsagePage` or `GatewayBatch` at most."""
CHECKPOINT_RECORDS = 500
"""A runtime writes checkpoints of the accounts that have changed after so many records, and at each minute's end."""


class Ended(StrEnum):
    """How an attempt ended for the runtime."""

    COMPLETED = RequestOutcome.COMPLETED.value
    FAILED = RequestOutcome.FAILED.value
    CANCELLED = RequestOutcome.CANCELLED.value
    """Its client left, or the gateway ended it."""
    LOST = "lost"
    """The process was killed while it ran. Written by the next process of the pod, from the running table."""


class Tokens(ApiModel):
    """Counts of one request or of many."""

    prompt_tokens: int = Field(default=0, ge=0)
    """Tokens of prompts, cached ones included; a prompt counts once for all answers of its request."""
    cached_tokens: int = Field(default=0, ge=0)
    """Tokens of prompts that were not computed again."""
    completion_tokens: int = Field(default=0, ge=0)
    """Generated tokens of all answers."""
    gpu_ns: int = Field(default=0, ge=0)
    """Its share of the time of the engine's steps."""


# --- records of a runtime ----------------------------------------------------------------


class BootRecord(ApiModel):
    """The first record of a process."""

    kind: Literal["boot"] = "boot"
    seq: int
    """Number within this process."""
    started_unix_ms: int
    """When accounting began: the uptime of the first minute counts from here."""
    device: str = ""
    """The accelerator as its driver names it, or `cpu`."""
    slots: int = 0
    """Adapters that fit on the device at one time."""
    slot_bytes: int = 0
    """Bytes of all slots together."""
    device_bytes: int = 0
    """Bytes of the device that the process uses: base, KV cache and slots."""


class RequestRecord(Tokens):
    """An admitted request that has ended."""

    kind: Literal["request"] = "request"
    seq: int
    """Number within this process."""
    attempt: str = Field(max_length=128)
    """Its `x-lorapool-attempt`."""
    request_id: str = Field(default="", max_length=128)
    """Its `x-request-id`, which a client may have chosen: for look-ups, never a key."""
    key_uid: str = Field(default="", max_length=64)
    """Its `x-lorapool-key`; empty when the request did not come through a gateway."""
    project: str = Field(default="", max_length=63)
    """Its `x-lorapool-project`; empty when the request did not come through a gateway."""
    uid: str = Field(default="", max_length=64)
    """Uid of the LoraAdapter; empty for the base."""
    digest: str = Field(default="", max_length=128)
    """Digest of the adapter's files; empty for the base."""
    model: str = Field(default="", max_length=320)
    """`namespace/name` of the adapter; empty for the base."""
    sequences: int = Field(default=1, ge=1)
    """Answers that it asked for."""
    outcome: Ended
    """How it ended."""
    started_unix_ms: int
    """When the engine took it."""
    ended_unix_ms: int
    """When it ended."""


class CheckpointRecord(Tokens):
    """The totals of one account of this process, over all requests that ended before this record.

    They are counted apart from the records, so that the ledger can compare the two.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    seq: int
    """Number within this process."""
    uid: str = ""
    """Uid of the LoraAdapter; empty for the base."""
    requests: int = Field(ge=0)
    """Requests that ended, in any way."""


class MinuteLine(ApiModel):
    """The part of one account in a minute."""

    uid: str = ""
    """Uid of the LoraAdapter; empty for the base."""
    model: str = ""
    """`namespace/name` of the adapter; empty for the base."""
    gpu_ns: int = Field(default=0, ge=0)
    """Its share of the time of the engine's steps, of requests that have ended and that run."""
    byte_ns: int = Field(default=0, ge=0)
    """Bytes of the device that it occupied times nanoseconds of the minute. Larger than 64 bits."""


class MinuteRecord(ApiModel):
    """How one minute of the process's life was used. The first and the last may be shorter than a minute."""

    kind: Literal["minute"] = "minute"
    seq: int
    """Number within this process."""
    minute_unix_s: int
    """Start of the UTC minute."""
    uptime_ns: int = Field(ge=0)
    """Time in this minute in which the process lived. Of all minutes together: from the boot record to the end."""
    busy_ns: int = Field(ge=0)
    """Time of the engine's steps; the sum of `gpu_ns` of the lines. The rest of the uptime was idle."""
    lines: list[MinuteLine] = Field(default_factory=list)
    """Accounts that used anything."""


class ResidencyType(StrEnum):
    """What happened to an adapter on the device."""

    LOADED = "loaded"
    UNLOADED = "unloaded"
    FAILED = "failed"


class ResidencyRecord(ApiModel):
    """An adapter was loaded onto the device, unloaded from it, or failed to load."""

    kind: Literal["residency"] = "residency"
    seq: int
    """Number within this process."""
    type: ResidencyType
    """What happened."""
    uid: str
    """Uid of the LoraAdapter."""
    digest: str
    """Digest of its files."""
    model: str
    """`namespace/name`."""
    at_unix_ms: int
    """When it happened."""
    device_bytes: int = 0
    """Bytes loaded or freed on the device."""
    took_ns: int = 0
    """Duration of the load, or of the residency that ended."""
    reason: str = Field(default="", max_length=64)
    """Why the load failed."""


class RemainderRecord(Tokens):
    """Requests whose own records were given up since too many were kept: their sum by account, key, hour and outcome.

    Sums stay exact; only the single requests are forgotten.
    """

    kind: Literal["remainder"] = "remainder"
    seq: int
    """Number within this process: that of the last request in it."""
    first_seq: int
    """Number of the first request in it."""
    hour_unix_s: int
    """Start of the UTC hour in which the requests ended."""
    key_uid: str = ""
    """As in the requests."""
    project: str = ""
    """As in the requests."""
    uid: str = ""
    """As in the requests."""
    model: str = ""
    """As in the requests."""
    outcome: Ended
    """As in the requests."""
    requests: int = Field(ge=1)
    """How many."""


class EndRecord(ApiModel):
    """The last record of a process. That of a killed one is written by the next process of the pod."""

    kind: Literal["end"] = "end"
    seq: int
    """Number within this process."""
    ended_unix_ms: int
    """When it ended; of a killed process, its last proven sign of life."""
    killed: bool = False
    """Whether it was killed: what it did after the last sign of life is not known."""


RuntimeRecord = Annotated[
    BootRecord | RequestRecord | CheckpointRecord | MinuteRecord | ResidencyRecord | RemainderRecord | EndRecord,
    Field(discriminator="kind"),
]


class BootState(ApiModel):
    """The records that are kept of one process of the pod."""

    boot_id: str
    """Identifier of the process."""
    first_seq: int
    """Oldest record that is kept. All before it were acknowledged, or are in remainders."""
    last_seq: int
    """Newest record."""
    ended: bool
    """Whether the process has ended, so that no record will follow."""


class UsagePage(ApiModel):
    """Response of `GET /v1/usage`: records of one process numbered above SEQ, in order."""

    boot_id: str
    """Identifier of the process whose records these are."""
    boots: list[BootState]
    """All processes of the pod of which records are kept, oldest first; the last one is the present process."""
    records: list[RuntimeRecord]
    """At most `PAGE_RECORDS`. A gap between two numbers is covered by a remainder."""
    now_unix_ms: int
    """The runtime's clock."""


# --- records of a gateway ----------------------------------------------------------------


class AttemptEnd(StrEnum):
    """How an attempt ended for the gateway."""

    COMPLETED = "completed"
    """The whole answer was delivered."""
    CLIENT_LEFT = "client_left"
    """The client left before the end."""
    FAILED = "failed"
    """The runtime ended it with an error, or sent something that is not of the protocol."""
    LOST = "lost"
    """The connection or the pod was lost."""
    REFUSED = "refused"
    """The runtime did not admit it: nothing was computed."""
    WITHHELD = "withheld"
    """The answer was of other weights than the resolved ones."""
    TIMEOUT = "timeout"
    """The gateway's own limit of time."""


class OpenedRecord(ApiModel):
    """An attempt that is about to be sent to a runtime. Written before it is sent."""

    kind: Literal["opened"] = "opened"
    seq: int
    """Number within this process."""
    attempt: str = Field(max_length=128)
    """A UUID of version 7 that the gateway made."""
    request_id: str = Field(max_length=128)
    """As in the client's response."""
    key_uid: str = Field(max_length=64)
    """Uid of the Secret of the API key."""
    key: str = Field(max_length=253)
    """Name of that Secret."""
    owner: str = Field(default="", max_length=128)
    """`owner` of that Secret."""
    project: str = Field(max_length=63)
    """The namespace that pays: the adapter's; for a base the default namespace of the key, or its only one, or the
    base's."""
    model: str = Field(max_length=320)
    """`namespace/name` of the adapter or base."""
    uid: str = Field(default="", max_length=64)
    """Uid of the LoraAdapter; empty for the base."""
    digest: str = Field(default="", max_length=128)
    """Digest of the adapter's files."""
    base_uid: str = Field(max_length=64)
    """Uid of the BaseModel."""
    base: str = Field(max_length=320)
    """`namespace/name` of the BaseModel."""
    pod_uid: str = Field(max_length=64)
    """The runtime's pod."""
    boot_id: str = Field(default="", max_length=64)
    """The runtime's process, as far as the gateway knows."""
    route: str = Field(max_length=64)
    """Path of the API."""
    stream: bool = False
    """Whether the client asked for events."""
    opened_unix_ms: int
    """When."""


class ClosedRecord(ApiModel):
    """An attempt that has ended."""

    kind: Literal["closed"] = "closed"
    seq: int
    """Number within this process."""
    attempt: str = Field(max_length=128)
    """As in the opened record."""
    outcome: AttemptEnd
    """How it ended."""
    code: int = 0
    """HTTP status that the client was sent; 0 when none was, or when another attempt follows."""
    prompt_tokens: int | None = Field(default=None, ge=0)
    """As the runtime last said; absent when it said nothing."""
    cached_tokens: int | None = Field(default=None, ge=0)
    """As the runtime last said."""
    completion_tokens: int | None = Field(default=None, ge=0)
    """As the runtime last said: at most what it computed, and at least what was delivered."""
    cold_ms: int | None = Field(default=None, ge=0)
    """Milliseconds that the request waited for its adapter; absent when warm."""
    closed_unix_ms: int
    """When."""


class RefusalsRecord(ApiModel):
    """Requests of one minute that the gateway refused without an attempt, by reason. Unknown keys are one row."""

    kind: Literal["refusals"] = "refusals"
    seq: int
    """Number within this process."""
    minute_unix_s: int
    """Start of the UTC minute."""
    key_uid: str = ""
    """Uid of the Secret of the API key; empty when it was not known."""
    project: str = ""
    """The namespace that the model would have been billed to; empty when it was not known."""
    code: str = Field(max_length=64)
    """Code of the error, such as `rate_limit_exceeded`."""
    count: int = Field(ge=1)
    """How many."""


GatewayRecord = Annotated[OpenedRecord | ClosedRecord | RefusalsRecord, Field(discriminator="kind")]


class GatewayBatch(ApiModel):
    """Body of `POST /v1/attempts`: records of one gateway process in order, without a gap.

    What many opened records have in common may be sent once: `parties` maps numbers to objects with fields of
    `OpenedRecord`, and an opened record has the number as its `parties` instead of these fields.
    """

    boot_id: str = Field(max_length=64)
    """Identifier of the gateway process that wrote them. A successor in the pod sends those of its predecessor."""
    gateway: str = Field(max_length=253)
    """Name of the gateway's pod."""
    records: list[GatewayRecord] = Field(max_length=PAGE_RECORDS)
    """In order."""
    ended: bool = False
    """Whether the process has ended, so that these are its last records, or none if all were sent before."""
    lost_before: int = 0
    """Records below this number that were never sent cannot be sent any more: their lines are damaged, or the ledger
    forgot what it had acknowledged. A gap up to here is recorded as a finding and is no error."""
    now_unix_ms: int
    """The sender's clock."""

    @model_validator(mode="before")
    @classmethod
    def _insert_parties(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "parties" not in given:
            return given
        parties, records = given["parties"], given.get("records")
        if not isinstance(parties, dict) or not isinstance(records, list):
            raise ValueError("parties and records must be an object and a list")
        for record in records:
            if isinstance(record, dict) and "parties" in record:
                found = parties.get(str(record["parties"]))
                if not isinstance(found, dict):
                    raise ValueError(f"the parties {str(record['parties'])[:20]} of a record are not in the batch")
                record.update(found)
        return given


class BatchAnswer(ApiModel):
    """Response of `POST /v1/attempts`: everything up to `through` is committed and may be forgotten.

    Records that are committed already are skipped. Status 409 with the same body: the batch begins after `through + 1`
    and `lost_before` does not cover the gap, so that nothing of it was committed. The sender continues at
    `through + 1`.
    """

    through: int
    """Number of the last record of this process that is committed; 0 for a process that is not known."""
