"""What the console shows of the present: objects of the API server and the state of quotas. The process provides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from lorapool_ledger.reports.scope import Scope


@dataclass(frozen=True, slots=True)
class AdapterNow:
    """A LoraAdapter as it is now."""

    model: str
    base: str
    ready: bool
    state: str
    """Why it is where it is, in words."""
    digest: str = ""
    loaded_on: tuple[str, ...] = ()
    """Pods that have it on the device."""
    preferred_replicas: int = 0


@dataclass(frozen=True, slots=True)
class JobNow:
    """A FineTuneJob."""

    namespace: str
    name: str
    base: str
    phase: str
    message: str
    created_unix_s: float
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class LimitNow:
    """A quota, budget or rate with what is used of it."""

    subject: str
    """`project <namespace>`, `key <name>` or `model <namespace>/<name>`."""
    meter: str
    """In words: requests per minute, tokens per month, …"""
    used: Decimal
    limit: Decimal
    unit: str
    """`requests`, `tokens`, or a currency."""
    resets_unix_s: float | None
    """When nothing will be used again; None: it refills all the time."""

    @property
    def share(self) -> float:
        """The used part, 0 and more."""
        return float(self.used / self.limit) if self.limit else 1.0

    @property
    def left(self) -> Decimal:
        return max(Decimal(0), self.limit - self.used)


class Live(Protocol):
    def adapter(self, model: str) -> AdapterNow | None:
        """The adapter with this full name."""

    def jobs(self, projects: frozenset[str] | None) -> Sequence[JobNow]:
        """The fine-tuning jobs of these namespaces, newest first; None: of all."""

    async def limits(self, scope: Scope) -> Sequence[LimitNow]:
        """The limits of what the scope has, those that are used most first."""


class NothingLive:
    """Where the process watches no objects."""

    def adapter(self, model: str) -> AdapterNow | None:
        return None

    def jobs(self, projects: frozenset[str] | None) -> Sequence[JobNow]:
        return ()

    async def limits(self, scope: Scope) -> Sequence[LimitNow]:
        return ()
