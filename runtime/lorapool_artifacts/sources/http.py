"""HTTP for the hf and oci sources: one guarded session, and errors for HTTP statuses.

Every request and the addresses of its host are checked before a connection is opened (`address_guard`), also those of
redirects and token services. Every request has timeouts, redirects are limited and never go from https to http, and
credentials are not sent to another host (requests drops them). There are no retries here: `fetch` resumes downloads,
and the operator and the runtime back off.
"""

from __future__ import annotations

import contextlib
import email.utils
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.sources.address_guard import AddressGuard
from lorapool_artifacts.sources.base import CHUNK_BYTES

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 3600.0
USER_AGENT = "lorapool"


class GuardedSession(requests.Session):
    """A session with one source's host and the hosts that it redirects to. Used by one thread."""

    def __init__(self, guard: AddressGuard, deadline: Deadline) -> None:
        super().__init__()
        self.max_redirects = MAX_REDIRECTS
        self.auth = _no_netrc
        self.headers["User-Agent"] = USER_AGENT
        self.headers["Accept-Encoding"] = "identity"
        adapter = _GuardedAdapter(guard, deadline)
        self.mount("https://", adapter)
        self.mount("http://", adapter)

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Refuses a redirect from https to http, in addition to dropping credentials for another host."""
        super().rebuild_auth(prepared_request, response)  # type: ignore[no-untyped-call]
        if response.url.startswith("https:") and not (prepared_request.url or "").startswith("https:"):
            raise ArtifactError(
                FailureReason.INVALID_SOURCE,
                "The source redirects from https to http, which is refused; fix its address.",
            )


class _GuardedAdapter(HTTPAdapter):
    """Checks the host of every request and sets its timeouts."""

    def __init__(self, guard: AddressGuard, deadline: Deadline) -> None:
        self._guard = guard
        self._deadline = deadline
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        plain, secure = _guarded_pools(self._guard)
        self.poolmanager.pool_classes_by_scheme = {"http": plain, "https": secure}

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        self._deadline.check()
        self._deadline.progress()
        url = request.url or ""
        self._guard.check_url(url, proxied=select_proxy(url, kwargs.get("proxies")) is not None)
        kwargs["timeout"] = self._deadline.request_timeout_s()
        return super().send(request, *args, **kwargs)


def _guarded_pools(guard: AddressGuard) -> tuple[type[HTTPConnectionPool], type[HTTPSConnectionPool]]:
    """The pools of connections that are opened directly; requests uses others for those to a proxy."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _connected(guard, self, super()._new_conn)

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _connected(guard, self, super()._new_conn)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return PlainPool, SecurePool


def _connected(guard: AddressGuard, connection: HTTPConnection, connect: Callable[[], socket.socket]) -> socket.socket:
    """Connects to the first of the host's checked addresses that accepts."""
    name = connection._dns_host
    try:
        addresses = guard.addresses(name, connection.port)
    except socket.gaierror as error:
        raise NameResolutionError(connection.host, connection, error) from error
    try:
        for address in addresses[:-1]:
            with contextlib.suppress(NewConnectionError, ConnectTimeoutError):
                connection._dns_host = address
                return connect()
        connection._dns_host = addresses[-1]
        return connect()
    finally:
        connection._dns_host = name  # it is also the name that the certificate must have


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def iter_body(response: requests.Response, deadline: Deadline, *, skip: int, length: int | None) -> Iterator[bytes]:
    """At most `length` bytes of the body after the first `skip`, as they arrive. Closes the response.

    Raises ArtifactError.
    """
    left = length
    with contextlib.closing(response), translated(deadline):
        while left is None or left > 0:
            deadline.check()
            chunk = response.raw.read1(CHUNK_BYTES)
            if not chunk:
                return
            deadline.progress()
            if skip:
                chunk, skip = chunk[skip:], max(0, skip - len(chunk))
            if left is not None:
                chunk = chunk[:left]
                left -= len(chunk)
            if chunk:
                yield chunk


def read_bounded(response: requests.Response, deadline: Deadline, max_bytes: int, what: str) -> bytes:
    """The whole body. Raises ArtifactError when it is longer than `max_bytes`."""
    body = b"".join(iter_body(response, deadline, skip=0, length=max_bytes + 1))
    if len(body) > max_bytes:
        raise ArtifactError(FailureReason.INVALID_SOURCE, f"{deadline.where}: {what} is longer than {max_bytes} bytes.")
    return body


def range_header(start: int, length: int | None) -> dict[str, str]:
    """The Range header of a request for a part of a file; empty for the whole file."""
    if start == 0 and length is None:
        return {}
    return {"Range": f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"}


@contextlib.contextmanager
def translated(deadline: Deadline) -> Iterator[None]:
    """Turns errors of requests and urllib3 into ArtifactErrors, by type."""
    try:
        yield
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise deadline.idle_error() from error
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise ArtifactError(FailureReason.INVALID_SOURCE, f"{deadline.where}: its address cannot be used.") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise unreachable(error, where=deadline.where) from error


def unreachable(error: BaseException, *, where: str) -> ArtifactError:
    """The error of a connection that could not be opened or broke off, with the remedy for its root cause."""
    causes = tuple(_causes(error))
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        message = f"{where}: its host name is not found (DNS); check the address. It is retried."
    elif any(isinstance(cause, ssl.SSLError | requests.exceptions.SSLError) for cause in causes):
        message = (
            f"{where}: no trusted TLS connection; check its certificate, add its authority to the chart's "
            "artifacts.caBundle, or list the host as insecure if it only supports plain HTTP. It is retried."
        )
    elif any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        message = f"{where}: the connection is refused; check the port and whether the service runs. It is retried."
    else:
        message = f"{where} cannot be reached or broke off ({type(error).__name__}); it is retried."
    return ArtifactError(FailureReason.SOURCE_UNAVAILABLE, message)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it: requests and urllib3 keep that in `args` and `reason`, others in `__cause__`."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        here = waiting.pop()
        if isinstance(here, BaseException) and here not in seen:
            seen.append(here)
            waiting += [*here.args, getattr(here, "reason", None), here.__cause__, here.__context__]
    yield from seen


def error_of_status(status: int, headers: Mapping[str, str], *, where: str, what: str, access: str) -> ArtifactError:
    """The error of an HTTP status other than success. `access` tells the owner how to grant access."""
    if status in (404, 410):
        return ArtifactError(
            FailureReason.SOURCE_NOT_FOUND, f"{where}: {what} does not exist (HTTP {status}); check the source."
        )
    if status in (401, 403):
        return ArtifactError(
            FailureReason.UNAUTHORIZED, f"{where}: access to {what} is denied (HTTP {status}); {access}."
        )
    if status == 429:
        return ArtifactError(
            FailureReason.RATE_LIMITED,
            f"{where} limits the rate of requests (HTTP 429); it is retried later.",
            retry_after_s=retry_after_s(headers),
        )
    if status in (408, 504):
        return ArtifactError(FailureReason.SOURCE_TIMEOUT, f"{where} timed out (HTTP {status}); it is retried.")
    if status >= 500:
        return ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE,
            f"{where} fails (HTTP {status}); it is retried.",
            retry_after_s=retry_after_s(headers),
        )
    if status == 416:
        return ArtifactError(
            FailureReason.CORRUPT_ARTIFACT, f"{where}: {what} is shorter than listed; upload it again."
        )
    return ArtifactError(
        FailureReason.INVALID_SOURCE, f"{where}: the request for {what} is refused (HTTP {status}); check the source."
    )


def retry_after_s(headers: Mapping[str, str], *, now_s: float | None = None) -> float | None:
    """Seconds of a Retry-After header given as a number or a date, at most an hour; None without a valid one."""
    value = next((value for key, value in headers.items() if key.lower() == "retry-after"), "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER_S)
    try:
        until_s = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, until_s - (time.time() if now_s is None else now_s)), MAX_RETRY_AFTER_S)
