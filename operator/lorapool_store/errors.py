"""What the store refuses, as an HTTP status with a stable code."""

from __future__ import annotations

from typing import Any

from lorapool_api.store_protocol import (
    CODE_NOT_PERMITTED,
    CODE_OBJECT_EXISTS,
    CODE_OBJECT_NOT_FOUND,
    CODE_QUOTA_EXCEEDED,
)


class StoreError(Exception):
    """A refused request. The message is for the log of the caller, which is another part of the release."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body, in the form of OpenAI's errors."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


def not_found() -> StoreError:
    return StoreError(404, CODE_OBJECT_NOT_FOUND, "There is no such object.")


def exists() -> StoreError:
    return StoreError(412, CODE_OBJECT_EXISTS, "The object exists or is another one by now.")


def not_permitted() -> StoreError:
    return StoreError(403, CODE_NOT_PERMITTED, "The token does not cover this object.")


def too_large(max_bytes: int) -> StoreError:
    return StoreError(413, "object_too_large", f"An object may have at most {max_bytes} bytes.")


def over_quota(namespace: str, quota_bytes: int) -> StoreError:
    message = f"The objects of namespace {namespace} may have {quota_bytes} bytes together. Delete some."
    return StoreError(507, CODE_QUOTA_EXCEEDED, message)
