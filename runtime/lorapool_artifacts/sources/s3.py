"""`s3://bucket/prefix`: a folder of an S3 bucket, over obstore.

Endpoint and keys belong to the process (AWS_*), never to the tenant. S3 lists no SHA-256, so the revision is a hash of
names, sizes and ETags, and every read requires the listed ETag. A process without an AWS identity reads anonymously
instead of asking the machine's metadata service for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import S3Store

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.sources.address_guard import AddressGuard
from lorapool_artifacts.sources.base import CHUNK_BYTES, changed, files_below
from lorapool_artifacts.sources.http import GuardedSession, error_of_status
from lorapool_artifacts.sources.http import translated as translated_http
from lorapool_artifacts.uri import S3Uri

REVISION_PREFIX = "etag-"
DEFAULT_REGION = "us-east-1"
ACCESS = "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a service account with a role) that may list and read it"
_AMBIENT = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)


class S3Source:
    """The objects below one prefix, those directly below it as listed when the source was opened."""

    def __init__(self, uri: S3Uri, store: Any, settings: SourceSettings, deadline: Deadline) -> None:
        self.where = str(uri)
        self._store = store
        self._prefix = f"{uri.prefix}/" if uri.prefix else ""
        self._deadline = deadline
        found = _list(uri, store, self._prefix, settings, deadline)
        self._objects = {item["path"].removeprefix(self._prefix): item for item in found}
        lines = (f"{name}\0{item['size']}\0{item['e_tag']}\n" for name, item in sorted(self._objects.items()))
        self.revision = f"{REVISION_PREFIX}{hashlib.sha256(''.join(lines).encode()).hexdigest()[:32]}"

    def list_files(self) -> Sequence[RemoteFile]:
        files = [RemoteFile(name, item["size"]) for name, item in self._objects.items()]
        if not any(name.endswith(".safetensors") for name in self._objects):
            files += self._nested()
        if not files:
            raise ArtifactError(
                FailureReason.SOURCE_NOT_FOUND,
                f"{self.where} holds no objects; check the bucket, the prefix and its case.",
            )
        return files

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        item = self._objects[name]
        end = item["size"] if length is None else min(item["size"], start + length)
        if start >= end:
            return
        options: dict[str, Any] = {"range": (start, end)}
        if item["e_tag"]:
            options["if_match"] = item["e_tag"]
        try:
            with translated(self._deadline, name):
                chunks = obstore.get(self._store, item["path"], options=options).stream(min_chunk_size=CHUNK_BYTES)
                for chunk in chunks:
                    self._deadline.check()
                    self._deadline.progress()
                    yield bytes(chunk)
        except PreconditionError as error:
            raise changed(self.where, name) from error

    def _nested(self) -> Sequence[RemoteFile]:
        """The objects in sub folders, of the first page of the listing only."""
        with translated(self._deadline, "the prefix"):
            page = next(iter(obstore.list(self._store, self._prefix or None, chunk_size=1000)), ())
        below = files_below(self._prefix, [RemoteFile(item["path"], item["size"]) for item in page])
        return [file for file in below if "/" in file.name]

    def close(self) -> None:
        self._store = None


def open_s3(uri: S3Uri, revision: str | None, settings: SourceSettings, deadline: Deadline) -> S3Source:
    """Lists the prefix. Raises ArtifactError."""
    if revision is not None and not revision.startswith(REVISION_PREFIX):
        raise ArtifactError(
            FailureReason.INVALID_SOURCE,
            f"{uri}: a bucket has no named revisions; remove spec.source.revision and give spec.source.digest instead.",
        )
    if settings.s3_endpoint:
        AddressGuard.of(settings, str(uri)).with_endpoint(settings.s3_endpoint).check_host(settings.s3_endpoint)
    return S3Source(uri, _store(uri, settings, deadline), settings, deadline)


def _list(uri: S3Uri, store: Any, prefix: str, settings: SourceSettings, deadline: Deadline) -> Sequence[Any]:
    """Lists the prefix. obstore reports no HTTP status of a failed listing, so the bucket is requested once more."""
    try:
        with translated(deadline, "the bucket or prefix"):
            return list(obstore.list_with_delimiter(store, prefix or None)["objects"])
    except ArtifactError as error:
        if error.reason is not FailureReason.SOURCE_UNAVAILABLE:
            raise
        raise _status_of_bucket(uri, store, settings, deadline) or error from error.__cause__


def _status_of_bucket(uri: S3Uri, store: Any, settings: SourceSettings, deadline: Deadline) -> ArtifactError | None:
    """The error for the bucket's own HTTP status, or None when the status is a success."""
    endpoint = settings.s3_endpoint or f"https://s3.{settings.s3_region or DEFAULT_REGION}.amazonaws.com"
    if _is_anonymous(settings):
        url = f"{endpoint.rstrip('/')}/{uri.bucket}/"
    else:
        with translated(deadline, "the bucket"):
            url = obstore.sign(store, "GET", "", timedelta(seconds=60))
    guard = AddressGuard.of(settings, deadline.where)
    guard = guard.with_endpoint(url) if settings.s3_endpoint else guard
    with GuardedSession(guard, deadline) as session, translated_http(deadline):
        response = session.get(url, stream=True, allow_redirects=False)
        response.close()
    if response.status_code < 400:
        return None
    what = f"the bucket {uri.bucket}"
    return error_of_status(response.status_code, response.headers, where=str(uri), what=what, access=ACCESS)


def _is_anonymous(settings: SourceSettings) -> bool:
    if settings.s3_access_key_id and settings.s3_secret_access_key:
        return False
    return settings.s3_anonymous or not (settings.ambient and any(os.environ.get(name) for name in _AMBIENT))


def _store(uri: S3Uri, settings: SourceSettings, deadline: Deadline) -> Any:
    config: dict[str, Any] = {
        "region": settings.s3_region or DEFAULT_REGION,
        "virtual_hosted_style_request": settings.s3_virtual_hosted,
    }
    if settings.s3_endpoint:
        config["endpoint"] = settings.s3_endpoint
    if settings.s3_access_key_id and settings.s3_secret_access_key:
        config["access_key_id"] = settings.s3_access_key_id
        config["secret_access_key"] = settings.s3_secret_access_key
        if settings.s3_session_token:
            config["session_token"] = settings.s3_session_token
    elif _is_anonymous(settings):
        config["skip_signature"] = True
    connect_s, _ = deadline.request_timeout_s()
    return S3Store(
        uri.bucket,
        config=config,
        client_options={
            "allow_http": (settings.s3_endpoint or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=connect_s),
            "timeout": timedelta(seconds=deadline.limits.total_timeout_s),
        },
        retry_config={
            "max_retries": 2,
            "retry_timeout": timedelta(seconds=min(10.0, deadline.limits.idle_timeout_s)),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
        },
    )


@contextlib.contextmanager
def translated(deadline: Deadline, what: str) -> Iterator[None]:
    """Turns obstore's errors into ArtifactErrors, by type."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(
            FailureReason.SOURCE_NOT_FOUND, f"{deadline.where}: {what} does not exist; check bucket and prefix."
        ) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise ArtifactError(
            FailureReason.UNAUTHORIZED, f"{deadline.where}: access to {what} is denied; {ACCESS}."
        ) from error
    except PreconditionError:
        raise
    except BaseError as error:
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE,
            f"{deadline.where}: the object store cannot be reached or fails ({type(error).__name__}); it is retried.",
        ) from error
