"""Why an engine cannot serve: each message names what to change, and needs no traceback.

EngineStartError
├── UnsupportedBaseError   this engine does not compute this base
├── UnsupportedVllmError   vLLM is not installed, or in a version that is not used
├── UnusableDeviceError    the GPU, or what is needed to use it, is missing
└── GroupError             another pod of the group has ended, or does not fit to this one
"""

from __future__ import annotations

from lorapool_api.common import Reason


class EngineStartError(ValueError):
    """The engine cannot start; the message says why and what to change."""

    reason: Reason = Reason.ENGINE_REFUSED

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class UnsupportedBaseError(EngineStartError):
    """This base cannot be served by this engine; the message says why."""

    reason: Reason = Reason.BASE_UNSUPPORTED


class UnsupportedVllmError(EngineStartError):
    """The installed vLLM cannot be used; the message says why and which version to install."""


class UnusableDeviceError(EngineStartError):
    """The device was asked for and cannot be used; the message names the remedy."""

    reason: Reason = Reason.DEVICE_UNUSABLE


class GroupError(EngineStartError):
    """The pods of a group cannot compute together, or no longer."""

    reason: Reason = Reason.GROUP_ENDED
