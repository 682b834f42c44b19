"""The errors that clients receive, in OpenAI's format.

Gateway and runtime raise them and each turns them into a response in one place.

    ApiError
    ├─ InvalidRequestError 400           ├─ PayloadTooLargeError 413
    ├─ UnauthenticatedError 401          ├─ UnprocessableError 422 (code: the adapter's failure reason)
    ├─ PermissionDeniedError 403         ├─ TooManyRequestsError 429 + Retry-After
    ├─ NotFoundError 404                 │  └─ QuotaExceededError 429
    │  ├─ ModelNotFoundError 404         ├─ ServerError 500
    │  ├─ RouteNotFoundError 404         └─ UnavailableError 503 + Retry-After
    │  ├─ UnknownFileError 404
    │  └─ UnknownJobError 404
    ├─ RuntimeNotRegisteredError 404 *
    ├─ MethodNotAllowedError 405
    ├─ RequestTimeoutError 408
    ├─ UnsupportedMediaTypeError 415
    └─ NoFreeSlotError 409 *

    * only between runtime and gateway
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from lorapool_api.common import FailureReason


class ApiError(Exception):
    """An error with an HTTP status, a stable `code` and a message that tells the user what to do."""

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
        """`Retry-After` in whole seconds, at least 1; empty when no time is known."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_s)))}


class InvalidRequestError(ApiError):
    """The request is malformed or uses a parameter or a value that is not supported."""

    status = 400
    type = "invalid_request_error"


class UnauthenticatedError(ApiError):
    """The API key is missing, malformed or unknown."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDeniedError(ApiError):
    """The key is known and may not do this at all, whatever it names."""

    status = 403
    type = "permission_error"
    default_code = "permission_denied"


class NotFoundError(ApiError):
    """What the request names does not exist, or is not the caller's; the response does not tell which."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFoundError(NotFoundError):
    """The model does not exist or the key may not use it."""

    default_code = "model_not_found"

    def __init__(self, model: str, full_names: Iterable[str] = ()) -> None:
        """`full_names`: the models that this short name may mean, all of which the key may use."""
        message = f"The model `{model[:128]}` does not exist or you do not have access to it."
        if names := [f"`{name}`" for name in full_names]:
            message = f"`{model[:128]}` is the name of several models. Use one of the full names {', '.join(names)}."
        super().__init__(message, param="model")


class RouteNotFoundError(NotFoundError):
    """There is no such path."""


class UnknownFileError(NotFoundError):
    """The file does not exist, or is another organization's."""

    default_code = "file_not_found"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"No such File object: {file_id[:128]}", param="id")


class UnknownJobError(NotFoundError):
    """The fine-tuning job does not exist, or is another organization's."""

    default_code = "fine_tune_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"Could not find fine tune: {job_id[:128]}", param="fine_tune_id")


class RequestTimeoutError(ApiError):
    """The body did not arrive in time. Client libraries send it again."""

    status = 408
    type = "invalid_request_error"
    default_code = "body_timeout"


class MethodNotAllowedError(ApiError):
    """The path exists, but not for this HTTP method."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class NoFreeSlotError(ApiError):
    """Every slot of the replica is in use. Only between runtime and gateway: client libraries would retry a 409."""

    status = 409
    type = "server_error"
    default_code = "no_slot"


class PayloadTooLargeError(ApiError):
    """The request body is longer than the limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class UnsupportedMediaTypeError(ApiError):
    """The request body is encoded in a way that is not supported."""

    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_encoding"


class UnprocessableError(ApiError):
    """The adapter cannot be served; the code is its failure reason."""

    status = 422
    type = "invalid_request_error"

    @classmethod
    def of_failure(cls, reason: FailureReason, message: str) -> UnprocessableError:
        """The error of a terminal failure."""
        return cls(message, param="model", code=reason.code)


class TooManyRequestsError(ApiError):
    """A queue is full or a limit is reached; the request may be repeated later."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class RateLimitError(TooManyRequestsError):
    """A rate of requests or tokens is reached."""

    def __init__(self, message: str, *, retry_after_s: float, rate: dict[str, str] | None = None) -> None:
        """`rate`: headers that describe the rate."""
        super().__init__(message, retry_after_s=retry_after_s)
        self._wait_ms = max(1, round(1000 * retry_after_s))
        self._rate = rate or {}

    def headers(self) -> dict[str, str]:
        """OpenAI's libraries wait for the milliseconds before they repeat the request."""
        return {**super().headers(), **self._rate, "retry-after-ms": str(self._wait_ms)}


class RequestRateError(RateLimitError):
    """Too many requests in a minute."""

    type = "requests"


class TokenRateError(RateLimitError):
    """Too many tokens in a minute."""

    type = "tokens"


class QuotaExceededError(TooManyRequestsError):
    """A quota of a longer time is used up, so that client libraries need not repeat the request."""

    type = "insufficient_quota"
    default_code = "insufficient_quota"

    def headers(self) -> dict[str, str]:
        """OpenAI's libraries repeat each 429 unless this says otherwise."""
        return {**super().headers(), "x-should-retry": "false"}


class ServerError(ApiError):
    """A fault of gateway or runtime; the log has the details under the request id."""

    status = 500
    type = "server_error"
    default_code = "internal_error"


class UnavailableError(ApiError):
    """No replica can serve the request now; it may be repeated later."""

    status = 503
    type = "server_error"
    default_code = "unavailable"


CODE_NOT_REGISTERED = "adapter_not_registered"
"""404 of the runtime: uid@digest is not registered; PUT its descriptor and repeat the request."""
CODE_NO_SLOT = "no_slot"
"""409 of the runtime: every slot is in use or pinned; try the next replica."""
CODE_DRAINING = "draining"
"""503 of the runtime: shutting down, nothing was accepted; try another replica."""
CODE_STARTING = "starting"
"""503 of the runtime: its base is still loading, nothing was accepted; try another replica."""
CODE_QUEUE_FULL = "queue_full"
"""429 of the runtime: its queue is full, nothing was accepted."""


class RuntimeNotRegisteredError(ApiError):
    """The runtime has no descriptor of the adapter. Only between runtime and gateway."""

    status = 404
    type = "invalid_request_error"
    default_code = CODE_NOT_REGISTERED


def client_fault(reason: FailureReason, message: str, retry_after_s: float | None = None) -> ApiError:
    """The error of a request to an adapter that failed: 422 if terminal, 503 with Retry-After if transient."""
    if reason.transient:
        return UnavailableError(message, param="model", code=reason.code, retry_after_s=retry_after_s or 5)
    return UnprocessableError.of_failure(reason, message)
