"""Values that observers hand to the plans, and plans to `apply`. Pure data; decides nothing.

Made by `observe`, `runtimes` and `judge`; read by `plan_base` and `plan_adapter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.loraadapter import UsagePart
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, RuntimeSnapshot
from lorapool_operator.world.cluster_cache import Key


@dataclass(frozen=True, slots=True)
class RuntimeView:
    """One runtime pod: what Kubernetes says of it, and what it said of itself."""

    pod: str
    pod_uid: str
    ready: bool
    """By Kubernetes."""
    terminating: bool
    snapshot: RuntimeSnapshot | None
    """The latest one, however old."""
    fresh: bool
    """The latest poll succeeded, or failed only a moment ago."""
    silent_s: float = 0.0
    """For how long its polls have failed."""

    @property
    def believed(self) -> RuntimeSnapshot | None:
        """The snapshot, when it may be taken for the present."""
        return self.snapshot if self.fresh and not self.terminating else None

    @property
    def serving(self) -> bool:
        """Takes requests and adapters now."""
        now = self.believed
        return now is not None and now.ready and not now.draining and self.ready


@dataclass(frozen=True, slots=True)
class AdapterAt:
    """What one runtime reports of one adapter: a report per digest, mostly one."""

    runtime: RuntimeView
    reports: tuple[AdapterReport, ...]

    def report(self, digest: str | None) -> AdapterReport | None:
        return next((item for item in self.reports if item.digest == digest), None)


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A source that was found: its identity, and what the headers say."""

    digest: str
    revision: str | None
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    reason: FailureReason
    message: str
    retry_after_s: float | None = None
    """When the source itself named a time."""
    facts: SourceFacts | None = None
    """What was found before it failed, if anything."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One finished inspection."""

    fingerprint: str
    """Of everything the verdict depends on; a verdict about another fingerprint is no verdict."""
    attempt: int
    outcome: SourceFacts | Failure
    at_unix_s: float
    jitter: float
    """Random in [0, 1), drawn by the judge, spread over retry times by the plan."""


@dataclass(frozen=True, slots=True)
class Judging:
    """An inspection that was asked for and has not ended."""

    fingerprint: str
    running_since_unix_s: float | None
    """None while it waits for its turn."""


@dataclass(frozen=True, slots=True)
class JudgeJob:
    """An inspection to be made."""

    key: Key
    uid: str
    fingerprint: str
    attempt: int
    uri: str
    revision: str | None
    digest: str | None
    """Expected; anything else is a DigestMismatch."""
    base_uid: str | None
    """The base an adapter is judged against; None when a base itself is."""
    max_rank: int
    via_pod_uid: str | None = None
    """A runtime that must read the source, where the operator cannot."""


@dataclass(frozen=True, slots=True)
class Register:
    """PUT an adapter at a runtime."""

    pod_uid: str
    pod: str
    adapter: AdapterKey
    descriptor: AdapterDescriptor


@dataclass(frozen=True, slots=True)
class Unregister:
    """DELETE an adapter at a runtime."""

    pod_uid: str
    pod: str
    adapter: AdapterKey
    display: str
    verify: bool = False
    """Ask the API server first whether the object is really gone: it was not seen, which proves nothing."""


class EventType(StrEnum):
    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True, slots=True)
class Note:
    """One Kubernetes Event."""

    type: EventType
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class CountedUse:
    """An adapter's use as runtimes counted it, also by those that are gone by now."""

    reports: tuple[UsagePart, ...] = ()
    gone_boots: frozenset[str] = frozenset()
    last_used_unix_s: float | None = None
