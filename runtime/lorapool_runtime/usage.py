"""What each adapter has used in this process, per uid over all its digests.

`adapters` and `server` count, the snapshot and the metrics read. Totals survive DELETE, so that an adapter that
comes back goes on where it was: per boot id the numbers only ever grow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorapool_api.loraadapter import UsagePart
from lorapool_api.protocol import Usage
from lorapool_runtime.openai.generation import Outcome

OTHER = "__other__"
"""Label of adapters beyond the number that have series of their own."""


@dataclass(slots=True)
class Account:
    uid: str
    display: str
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    resident_since_s: dict[str, float] = field(default_factory=dict)
    """Digest → monotonic time since which it has been on the device."""
    left_seconds: float = 0.0
    """Residency that has ended."""

    def count(self, outcome: Outcome, usage: Usage) -> None:
        match outcome:
            case Outcome.COMPLETED:
                self.completed += 1
            case Outcome.FAILED:
                self.failed += 1
            case Outcome.CANCELLED:
                self.cancelled += 1
            case Outcome.REFUSED:
                return
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens

    def arrived(self, digest: str, now_s: float, load_seconds: float) -> None:
        self.loads += 1
        self.load_seconds += load_seconds
        self.resident_since_s[digest] = now_s

    def departed(self, digest: str, now_s: float) -> float:
        """The residency in seconds that ends here."""
        seconds = max(0.0, now_s - self.resident_since_s.pop(digest, now_s))
        self.left_seconds += seconds
        return seconds

    def residency_seconds(self, now_s: float) -> float:
        return self.left_seconds + sum(max(0.0, now_s - since) for since in self.resident_since_s.values())

    def numbers(self, now_s: float) -> tuple[float, ...]:
        """Changes exactly when `part` does."""
        return (
            self.completed,
            self.failed,
            self.cancelled,
            self.prompt_tokens,
            self.completion_tokens,
            self.loads,
            self.load_seconds,
            self.residency_seconds(now_s),
        )

    def part(self, boot_id: str, now_s: float) -> UsagePart:
        return UsagePart(
            boot_id=boot_id,
            requests=self.completed + self.failed + self.cancelled,
            failed_requests=self.failed,
            cancelled_requests=self.cancelled,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            loads=self.loads,
            load_seconds=round(self.load_seconds, 3),
            residency_seconds=round(self.residency_seconds(now_s), 3),
        )


class Accounts:
    """All accounts of this process, and which of them are shown by name."""

    def __init__(self, tracked: int) -> None:
        self._tracked_max = tracked
        self._accounts: dict[str, Account] = {}
        self._named: dict[str, str] = {}  # uid → label
        self._present: dict[str, int] = {}  # uid → registered digests

    def enter(self, uid: str, display: str) -> Account:
        """One more digest of `uid` is registered."""
        account = self._accounts.setdefault(uid, Account(uid, display))
        account.display = display
        self._present[uid] = self._present.get(uid, 0) + 1
        if uid not in self._named and len(self._named) < self._tracked_max:
            self._named[uid] = display
        return account

    def leave(self, uid: str) -> None:
        """One digest fewer; with the last one its series vanish."""
        self._present[uid] -= 1
        if self._present[uid] == 0:
            del self._present[uid]
            self._named.pop(uid, None)

    def named(self) -> list[Account]:
        """Accounts with series of their own: registered ones, first come."""
        return [self._accounts[uid] for uid in self._named]

    def others(self) -> list[Account]:
        """Registered accounts that share `__other__`."""
        return [self._accounts[uid] for uid in self._present if uid not in self._named]
