"""A request that the engine has, and what was computed for it so far, in its row of the running table.

The engine's thread runs `LiveRequest.count`, before anyone sees the token; everything else runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorapool_api.protocol import Usage
from lorapool_runtime.accounts.running_table import CACHED, COMPLETION, GPU, PROMPT
from lorapool_runtime.accounts.usage import AdapterUsage


@dataclass(frozen=True, slots=True)
class Asked:
    """Who a request is of, and for what."""

    attempt: str
    request_id: str = ""
    key_uid: str = ""
    project: str = ""
    digest: str = ""
    model: str = ""


class LiveRequest:
    """A request that the engine has."""

    def __init__(
        self,
        asked: Asked,
        account: AdapterUsage,
        ids: Sequence[str],
        choices: int,
        started_unix_ms: int,
        words: memoryview,
    ) -> None:
        """`ids`: of its sequences, `choices` of each prompt."""
        self.asked, self.account, self.ids = asked, account, ids
        self.started_unix_ms = started_unix_ms
        self.gpu_ns = 0
        self.words: memoryview = words
        self.at = 0
        self._choices = choices
        self._made = [0] * len(ids)
        self._prompts = [0] * (len(ids) // choices)
        self._cached = [0] * (len(ids) // choices)

    def count(self, number: int, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """Counts what the engine has computed for its sequence `number` so far, in the engine's thread."""
        if (new := completion_tokens - self._made[number]) > 0:
            self._made[number] = completion_tokens
            self.words[self.at + COMPLETION] += new
        prompt = number // self._choices
        if prompt_tokens > self._prompts[prompt]:
            self.words[self.at + PROMPT] += prompt_tokens - self._prompts[prompt]
            self._prompts[prompt] = prompt_tokens
        if cached_tokens > self._cached[prompt]:
            self.words[self.at + CACHED] += cached_tokens - self._cached[prompt]
            self._cached[prompt] = cached_tokens

    @property
    def computed(self) -> Usage:
        """What the engine has computed for it so far."""
        words, at = self.words, self.at
        return Usage(
            prompt_tokens=words[at + PROMPT], cached_tokens=words[at + CACHED], completion_tokens=words[at + COMPLETION]
        )

    def add_gpu_ns(self, ns: int) -> None:
        self.gpu_ns += ns
        self.words[self.at + GPU] = self.gpu_ns
