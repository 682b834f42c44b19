"""The one tree of errors that clients see, in OpenAI's shape.

Raised in gateway and runtime, turned into a response in one place each.

    ApiError
    ├─ InvalidRequest 400      ├─ Unprocessable 422 (adapter's own fault: its failure's code)
    ├─ Unauthenticated 401     ├─ TooManyRequests 429 + Retry-After
    ├─ ModelNotFound 404       ├─ ServerError 500
    ├─ Conflict 409            └─ Unavailable 503 + Retry-After
    └─ PayloadTooLarge 413
"""

from __future__ import annotations

from typing import Any, ClassVar

from lorapool_api.common import FailureReason


class ApiError(Exception):
    """HTTP status, stable `code`, and a sentence a user can act on."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON body: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, at least 1, where set."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_s)))}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(ApiError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class ModelNotFound(ApiError):
    """Unknown and forbidden look the same."""

    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model[:128]}` does not exist or you do not have access to it.", param="model")


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class Conflict(ApiError):
    """Internal hop only: `no_slot`. Clients never see 409, their library would retry it blindly."""

    status = 409
    type = "server_error"
    default_code = "no_slot"


class PayloadTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class Unprocessable(ApiError):
    """The adapter itself cannot be served; its code says why."""

    status = 422
    type = "invalid_request_error"

    @classmethod
    def of_failure(cls, reason: FailureReason, message: str) -> Unprocessable:
        return cls(message, param="model", code=reason.code)


class TooManyRequests(ApiError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class ServerError(ApiError):
    status = 500
    type = "server_error"
    default_code = "internal_error"


class Unavailable(ApiError):
    status = 503
    type = "server_error"
    default_code = "unavailable"


CODE_NOT_REGISTERED = "adapter_not_registered"
"""404 of the runtime: it does not know uid@digest yet; PUT the descriptor and repeat."""
CODE_NO_SLOT = "no_slot"
"""409 of the runtime: every slot is in use or pinned; try the next replica."""
CODE_DRAINING = "draining"
"""503 of the runtime: shutting down, nothing was accepted; try another replica."""
CODE_STARTING = "starting"
"""503 of the runtime: its base is still loading, nothing was accepted; try another replica."""
CODE_QUEUE_FULL = "queue_full"
"""429 of the runtime: its waiting line is full, nothing was accepted."""


class RuntimeNotRegistered(ApiError):
    status = 404
    type = "invalid_request_error"
    default_code = CODE_NOT_REGISTERED


def client_fault(reason: FailureReason, message: str, retry_after_s: float | None = None) -> ApiError:
    """The error a request gets for an adapter's failure: 422 when terminal, 503 + Retry-After when transient."""
    if reason.transient:
        return Unavailable(message, param="model", code=reason.code, retry_after_s=retry_after_s or 5)
    return Unprocessable.of_failure(reason, message)
