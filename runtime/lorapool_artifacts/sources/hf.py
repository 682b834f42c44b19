"""`hf://org/name[/folder][@revision]`: a model repository of a Hugging Face hub.

huggingface_hub provides the hub's API, its URLs and the token (HF_ENDPOINT, HF_TOKEN). Files are downloaded through
our own session, so that they are bounded, resumable and cannot be redirected into the cluster. The hub lists the
SHA-256 of large files (LFS) only; small files are hashed while they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not in its __all__

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.sources.address_guard import AddressGuard
from lorapool_artifacts.sources.base import files_below
from lorapool_artifacts.sources.http import (
    GuardedSession,
    error_of_status,
    iter_body,
    range_header,
    translated,
    unreachable,
)
from lorapool_artifacts.uri import HfUri

PUBLIC_HUB = "https://huggingface.co"
ACCESS = (
    "if the repository is private or gated, put a token that may read it into HF_TOKEN (in the chart's "
    "artifacts.credentials Secret); if it does not exist, correct its name"
)
_COMMIT = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


class HfSource:
    """A repository at one commit."""

    def __init__(
        self, uri: HfUri, revision: str, files: Sequence[RemoteFile], settings: SourceSettings, deadline: Deadline
    ) -> None:
        self.where = uri.folder
        self.revision = revision
        self._repo = uri.repo
        self._prefix = f"{uri.path}/" if uri.path else ""
        self._files = files_below(self._prefix, files)
        self._endpoint = settings.hf_endpoint or PUBLIC_HUB
        self._deadline = deadline
        self._headers = build_hf_headers(token=_token(settings), library_name="lorapool")
        self._session = GuardedSession(_guard(settings, deadline), deadline)

    def list_files(self) -> Sequence[RemoteFile]:
        return self._files

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        url = hf_hub_url(self._repo, self._prefix + name, revision=self.revision, endpoint=self._endpoint)
        headers = {**self._headers, "Accept-Encoding": "identity", **range_header(start, length)}
        with translated(self._deadline):
            response = self._session.get(url, headers=headers, stream=True)
        if response.status_code not in (200, 206):
            response.close()
            raise error_of_status(response.status_code, response.headers, where=self.where, what=name, access=ACCESS)
        yield from iter_body(response, self._deadline, skip=start if response.status_code == 200 else 0, length=length)

    def close(self) -> None:
        self._session.close()


def open_hf(uri: HfUri, revision: str | None, settings: SourceSettings, deadline: Deadline) -> HfSource:
    """Asks the hub for the commit of the revision and lists its files. Raises ArtifactError."""
    endpoint = settings.hf_endpoint or PUBLIC_HUB
    _guard(settings, deadline).check_host(endpoint)
    deadline.progress()
    api = HfApi(endpoint=endpoint, token=_token(settings), library_name="lorapool")
    try:
        info = api.model_info(
            uri.repo, revision=revision or uri.revision, files_metadata=True, timeout=deadline.request_timeout_s()[1]
        )
    except HfHubHTTPError as error:
        raise error_of_status(
            error.response.status_code,
            error.response.headers,
            where=str(uri),
            what=_what_is_missing(revision or uri.revision),
            access=ACCESS,
        ) from error
    except httpx2.TimeoutException as error:
        raise deadline.idle_error() from error
    except (httpx2.HTTPError, OSError) as error:
        raise unreachable(error, where=f"{uri} at the hub {endpoint}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_a_hub(uri, endpoint) from error
    if not isinstance(info.sha, str) or not _COMMIT.match(info.sha):
        raise _not_a_hub(uri, endpoint)
    files = [_remote_file(item.rfilename, item.size, item.lfs) for item in info.siblings or ()]
    return HfSource(uri, info.sha, [file for file in files if file is not None], settings, deadline)


def _what_is_missing(revision: str | None) -> str:
    """The part of the URI that the hub does not know. A folder behind the revision is read as a part of its name."""
    if revision is None or "/" not in revision:
        return "the repository or revision"
    return (
        f"the repository or revision {revision!r} (a folder is written before the revision: hf://org/name/folder@main)"
    )


def _guard(settings: SourceSettings, deadline: Deadline) -> AddressGuard:
    guard = AddressGuard.of(settings, deadline.where)
    return guard.with_endpoint(settings.hf_endpoint) if settings.hf_endpoint else guard


def _token(settings: SourceSettings) -> str | bool | None:
    """The hub's token. None lets huggingface_hub look for one, False keeps it from that."""
    return settings.hf_token or (None if settings.ambient else False)


def _remote_file(name: str, size: int | None, lfs: object) -> RemoteFile | None:
    """A file as the hub lists it; None for a file without a size, which could not be bounded."""
    sha256 = getattr(lfs, "sha256", None)
    size_bytes = getattr(lfs, "size", None) if lfs is not None else size
    if not isinstance(size_bytes, int) or size_bytes < 0:
        return None
    return RemoteFile(name, size_bytes, sha256 if isinstance(sha256, str) and _SHA256.match(sha256) else None)


def _not_a_hub(uri: HfUri, endpoint: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.SOURCE_UNAVAILABLE, f"{uri}: {endpoint} does not respond like a model hub; check HF_ENDPOINT."
    )
