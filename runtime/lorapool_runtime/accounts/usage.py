"""The accounts of this process: requests, tokens, loads and residency of each adapter, over all its digests.

The base has an account too, without a uid.

Totals survive DELETE, so an adapter that is registered again continues its counts: per boot id the numbers only grow.
They include the tokens so far of requests that run, so that a process that is killed has reported most of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from lorapool_api.loraadapter import UsagePart
from lorapool_api.protocol import Usage

OTHER = "__other__"
"""Label of adapters beyond the number that have series of their own."""


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    """The engine did not accept it: nothing ran, nothing is counted."""


@dataclass(slots=True, eq=False)
class AdapterUsage:
    uid: str
    display: str
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    past_prompt_tokens: int = 0
    """Of requests that have ended."""
    past_completion_tokens: int = 0
    """Of requests that have ended."""
    past_cached_tokens: int = 0
    """Of requests that have ended."""
    past_gpu_ns: int = 0
    """Of requests that have ended: their share of the time of the engine's steps."""
    failed_loads: int = 0
    """Failed requests whose adapter could not be loaded: the engine never had them."""
    running: set[Callable[[], Usage]] = field(default_factory=set)
    """The usage so far of each request that runs."""
    loads: int = 0
    load_seconds: float = 0.0
    resident_since_s: dict[str, float] = field(default_factory=dict)
    """Digest → monotonic time since which it has been on the device."""
    past_residency_seconds: float = 0.0
    """Residency of digests that have been unloaded."""

    def rename(self, display: str) -> None:
        self.display = display

    @property
    def prompt_tokens(self) -> int:
        return self.past_prompt_tokens + sum(usage().prompt_tokens for usage in self.running)

    @property
    def completion_tokens(self) -> int:
        return self.past_completion_tokens + sum(usage().completion_tokens for usage in self.running)

    @property
    def cached_tokens(self) -> int:
        return self.past_cached_tokens + sum(usage().cached_tokens for usage in self.running)

    @property
    def ended(self) -> int:
        """Requests that the engine had and that ended, in any way."""
        return self.completed + self.failed + self.cancelled - self.failed_loads

    def begin(self, usage: Callable[[], Usage]) -> None:
        """Counts a request that runs; `usage` returns its usage so far."""
        self.running.add(usage)

    def count(self, outcome: Outcome, usage: Usage, gpu_ns: int = 0) -> None:
        """Counts a request that ended; a refused one is not counted."""
        match outcome:
            case Outcome.COMPLETED:
                self.completed += 1
            case Outcome.FAILED:
                self.failed += 1
            case Outcome.CANCELLED:
                self.cancelled += 1
            case Outcome.REFUSED:
                return
        self.past_prompt_tokens += usage.prompt_tokens
        self.past_completion_tokens += usage.completion_tokens
        self.past_cached_tokens += usage.cached_tokens
        self.past_gpu_ns += gpu_ns

    def end(self, usage: Callable[[], Usage], outcome: Outcome, gpu_ns: int = 0) -> None:
        """Counts the end of a request. One that the engine refused was not begun."""
        self.running.discard(usage)
        self.count(outcome, usage(), gpu_ns)

    def count_failed_load(self) -> None:
        """Counts a request that failed because its adapter could not be loaded."""
        self.failed += 1
        self.failed_loads += 1

    def loaded(self, digest: str, now_s: float, load_seconds: float) -> None:
        self.loads += 1
        self.load_seconds += load_seconds
        self.resident_since_s[digest] = now_s

    def unloaded(self, digest: str, now_s: float) -> float:
        """Marks the digest unloaded and returns how many seconds it was resident."""
        seconds = max(0.0, now_s - self.resident_since_s.pop(digest, now_s))
        self.past_residency_seconds += seconds
        return seconds

    def residency_seconds(self, now_s: float) -> float:
        return self.past_residency_seconds + sum(max(0.0, now_s - since) for since in self.resident_since_s.values())

    def values(self, now_s: float) -> tuple[float, ...]:
        """Every number of `report`, for comparison with an earlier call."""
        return (
            self.completed,
            self.failed,
            self.cancelled,
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.loads,
            self.load_seconds,
            self.residency_seconds(now_s),
        )

    def report(self, boot_id: str, now_s: float) -> UsagePart:
        return UsagePart(
            boot_id=boot_id,
            requests=self.completed + self.failed + self.cancelled,
            failed_requests=self.failed,
            cancelled_requests=self.cancelled,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            loads=self.loads,
            load_seconds=round(self.load_seconds, 3),
            residency_seconds=round(self.residency_seconds(now_s), 3),
        )


class UsageTracker:
    """The usage of every adapter of this process, and which adapters have metric series of their own."""

    def __init__(self, tracked: int) -> None:
        self._tracked_max = tracked
        self.base = AdapterUsage("", "")
        """The account of the base itself."""
        self._by_uid: dict[str, AdapterUsage] = {}
        self._labelled: set[str] = set()
        self._registered: dict[str, int] = {}  # uid → registered digests

    def of(self, uid: str, display: str) -> AdapterUsage:
        """The account of an adapter."""
        return self._by_uid.setdefault(uid, AdapterUsage(uid, display))

    def register(self, uid: str, display: str) -> AdapterUsage:
        """Counts one more registered digest of `uid`."""
        usage = self.of(uid, display)
        usage.rename(display)
        self._registered[uid] = self._registered.get(uid, 0) + 1
        if len(self._labelled) < self._tracked_max:
            self._labelled.add(uid)
        return usage

    def unregister(self, uid: str) -> None:
        """Counts one registered digest fewer. The adapter's metric series vanish with the last one."""
        self._registered[uid] -= 1
        if self._registered[uid] == 0:
            del self._registered[uid]
            self._labelled.discard(uid)

    def labelled(self) -> list[AdapterUsage]:
        """Registered adapters with metric series of their own: those that were registered first."""
        return [self._by_uid[uid] for uid in self._registered if uid in self._labelled]

    def others(self) -> list[AdapterUsage]:
        """Registered adapters that share the metric series `__other__`."""
        return [self._by_uid[uid] for uid in self._registered if uid not in self._labelled]
