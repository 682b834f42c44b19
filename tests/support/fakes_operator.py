"""Fakes of the operator's tests: sources, and runtimes whose reports a test writes by hand.

`ScriptedRuntime` is the common FakeRuntime over a real socket; a test may replace any report and set the load.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fakes import Adapter, FakeRuntime

from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.loraadapter import UsagePart
from lorapool_api.protocol import AdapterReport, RuntimeSnapshot
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import BaseFiles, BaseInspection
from lorapool_operator.world.observed import SourceFacts, SourceFailure

NOTHING_TO_MEASURE = SimpleNamespace(
    outcomes={}, writes={}, failures={}, failing={}, polls=0, poll_failures=0,
    ready_depth=lambda: 0, oldest_age_s=lambda: 0.0, waiting=lambda: 0,
)  # fmt: skip
"""Stands for the operator's queue and trackers where only its metrics of objects are of interest."""


def digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def found(text: str, *, rank: int = 8) -> SourceFacts:
    return SourceFacts(digest(text), f"rev-{text}", rank, ("q_proj", "v_proj"), 1000)


@dataclass
class FakeInspector:
    """Returns the answer for a uri; an unknown uri is found, with a digest made from the uri."""

    answers: dict[str, SourceFacts | SourceFailure | ArtifactError] = field(default_factory=dict)
    delay_s: float = 0.0
    asked: list[str] = field(default_factory=list)
    credentials: list[Mapping[str, str] | None] = field(default_factory=list)
    """Those of each adapter's inspection; None: the operator's."""
    against: list[BaseFacts | None] = field(default_factory=list)
    """The base that each adapter was checked against."""
    bases_asked: int = 0
    running: int = 0
    most_running: int = 0

    async def base(
        self, uri: str, revision: str | None, *, credentials: Mapping[str, str] | None = None
    ) -> BaseInspection:
        self.bases_asked += 1
        answer = self.answers.get(uri)
        if isinstance(answer, ArtifactError):
            raise answer
        return BaseInspection("rev-base", digest(uri), BaseFiles(), 5000)

    async def adapter(
        self,
        uri: str,
        revision: str | None,
        expected: str | None,
        base: BaseFacts | None,
        max_rank: int,
        *,
        credentials: Mapping[str, str] | None = None,
    ) -> SourceFacts | SourceFailure:
        self.asked.append(uri)
        self.credentials.append(credentials)
        self.against.append(base)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.running -= 1
        answer = self.answers.get(uri, found(uri))
        if isinstance(answer, ArtifactError):
            raise answer
        if isinstance(answer, SourceFacts) and expected not in (None, answer.digest):
            return SourceFailure(
                FailureReason.DIGEST_MISMATCH, f"{uri} holds {answer.digest}; correct spec.source.digest."
            )
        return answer


@dataclass
class ScriptedRuntime(FakeRuntime):
    """A fake runtime whose reports and load the test sets."""

    reports: dict[AdapterKey, dict[str, Any]] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, UsagePart] = field(default_factory=dict)
    base_digest: str | None = None
    deleted: list[AdapterKey] = field(default_factory=list)

    def snapshot(self) -> RuntimeSnapshot:
        made = super().snapshot()
        base = made.base.model_copy(update={"digest": self.base_digest})
        return made.model_copy(update={"base": base, **self.load})

    def _report(self, key: AdapterKey, adapter: Adapter) -> AdapterReport:
        made = super()._report(key, adapter)
        usage = self.parts.get(key.uid, UsagePart(boot_id=self.boot_id))
        pinned = adapter.descriptor.pinned
        return made.model_copy(update={"usage": usage, "pinned": pinned, **self.reports.get(key, {})})

    async def _delete(self, request: Any) -> Any:
        self.deleted.append(AdapterKey(request.match_info["uid"], request.match_info["digest"]))
        return await super()._delete(request)
