"""The one exception of this package: an artifact cannot be fetched or served.

    ArtifactError(reason, message, retry_after_s)
      reason.transient      -> try again (after `retry_after_s` when the source named a time)
      not reason.transient  -> terminal until the spec, the credentials or the source change

The operator turns it into a condition, the runtime into a response. `message` is one or two sentences for the
adapter's owner and names the remedy. It contains no credential and no file content.
"""

from __future__ import annotations

from lorapool_api.common import FailureReason

MAX_MESSAGE_CHARS = 900
"""Fits a condition's message (1024 characters) and leaves room for a prefix."""


class ArtifactError(Exception):
    """A source, its files or their content cannot be used."""

    def __init__(self, reason: FailureReason, message: str, *, retry_after_s: float | None = None) -> None:
        message = " ".join(message.split())
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[: MAX_MESSAGE_CHARS - 1] + "…"
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def transient(self) -> bool:
        """Whether another attempt may succeed without any change."""
        return self.reason.transient

    def __repr__(self) -> str:
        return f"ArtifactError({self.reason.value}, {self.message!r}, retry_after_s={self.retry_after_s})"
