"""Why an engine cannot serve: each message names what to change, and needs no traceback.

EngineStartError
├── UnsupportedBaseError   this engine does not compute this base
├── UnsupportedVllmError   vLLM is not installed, or in a version that is not used
└── UnusableDeviceError    the GPU, or what is needed to use it, is missing
"""

from __future__ import annotations


class EngineStartError(ValueError):
    """The engine cannot start; the message says why and what to change."""


class UnsupportedBaseError(EngineStartError):
    """This base cannot be served by this engine; the message says why."""


class UnsupportedVllmError(EngineStartError):
    """The installed vLLM cannot be used; the message says why and which version to install."""


class UnusableDeviceError(EngineStartError):
    """The device was asked for and cannot be used; the message names the remedy."""
