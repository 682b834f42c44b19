"""Reads and writes objects of the release's store over HTTP. Blocks; used by one thread."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import urlencode

import requests
from requests.adapters import HTTPAdapter

from lorapool_api.common import FailureReason
from lorapool_api.store_protocol import STORE_SERVER_NAME, StoreAccess, StoredObject, StoreListing, object_path
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import FetchLimits
from lorapool_artifacts.sources.http import error_of_status, iter_body, translated

ACCESS = "the release's store permits a namespace its own objects only"


class StoreClient:
    """One connection to the store, with the rights of its token. All methods raise ArtifactError."""

    def __init__(self, access: StoreAccess, deadline: Deadline | None = None) -> None:
        """`deadline`: by when everything must be done; None: each request has times of its own."""
        self._url = access.url.rstrip("/")
        self._given = deadline
        self._session = requests.Session()
        self._session.trust_env = False  # the store is inside the cluster: no proxy, no .netrc
        self._session.headers.update(
            {"Authorization": f"Bearer {access.token}", "Accept-Encoding": "identity", "User-Agent": "lorapool"}
        )
        if access.ca:
            self._session.mount("https://", _ReleaseAdapter(access.ca))

    def close(self) -> None:
        self._session.close()

    def list(self, namespace: str, prefix: str = "") -> list[StoredObject]:
        """All objects below a prefix that ends in a slash or is empty, sorted by key."""
        found: list[StoredObject] = []
        more = True
        while more:
            after = {"after": found[-1].key} if found else {}
            response = self._call("GET", namespace, prefix, query=after)
            page = StoreListing.model_validate_json(response.content)
            found += page.objects
            more = page.has_more and bool(page.objects)
        return found

    def head(self, namespace: str, key: str) -> StoredObject:
        """The size of an object and its ETag."""
        response = self._call("HEAD", namespace, key)
        return StoredObject(key=key, size=int(response.headers["Content-Length"]), etag=response.headers["ETag"])

    def stream(
        self, namespace: str, key: str, start: int = 0, length: int | None = None, *, etag: str | None = None
    ) -> Iterator[bytes]:
        """Bytes of an object from `start`; may end early when the connection does. `etag`: only of this version."""
        headers = {} if etag is None else {"If-Match": etag}
        if start or length is not None:
            headers["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        response = self._call("GET", namespace, key, headers=headers, stream=True)
        yield from iter_body(response, self._deadline(namespace, key), skip=0, length=length)

    def get(self, namespace: str, key: str) -> bytes:
        """A whole object."""
        return self._call("GET", namespace, key).content

    def put(self, namespace: str, key: str, data: bytes | BinaryIO | Iterator[bytes]) -> StoredObject:
        """Writes an object as a whole; the one of this name before stays until then."""
        return StoredObject.model_validate_json(self._call("PUT", namespace, key, data=data).content)

    def delete(self, namespace: str, key: str) -> None:
        """Deletes an object, or everything below a key that ends in a slash. Neither need exist."""
        self._call("DELETE", namespace, key)

    def _call(
        self, method: str, namespace: str, key: str, *, query: dict[str, str] | None = None, **more: Any
    ) -> requests.Response:
        deadline = self._deadline(namespace, key)
        deadline.check()
        url = self._url + object_path(namespace, key) + (f"?{urlencode(query)}" if query else "")
        with translated(deadline):
            response = self._session.request(
                method, url, timeout=deadline.request_timeout_s(), allow_redirects=False, **more
            )
        if response.status_code >= 400:
            with contextlib.closing(response):
                raise self._refused(response, deadline.where)
        return response

    def _deadline(self, namespace: str, key: str) -> Deadline:
        return self._given or Deadline(FetchLimits(), where=f"store://{namespace}/{key}")

    @staticmethod
    def _refused(response: requests.Response, where: str) -> ArtifactError:
        if response.status_code == 507:
            message = f"{where}: the namespace's share of the store is full; delete files that are not needed."
            return ArtifactError(FailureReason.DISK_FULL, message)
        if response.status_code == 412:
            message = f"{where} changed while it was read; it is read again from the start."
            return ArtifactError(FailureReason.SOURCE_UNAVAILABLE, message)
        return error_of_status(response.status_code, response.headers, where=where, what="the object", access=ACCESS)


class _ReleaseAdapter(HTTPAdapter):
    """Trusts the release's authority alone, and checks for the store's name whatever the address is."""

    def __init__(self, ca: str) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_verify_locations(cadata=ca)
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(
            *args,
            ssl_context=self._context,
            assert_hostname=STORE_SERVER_NAME,
            server_hostname=STORE_SERVER_NAME,
            **kwargs,
        )

    def cert_verify(self, *_args: Any, **_kwargs: Any) -> None:
        """The context has what is trusted; requests would add public authorities."""

    def build_connection_pool_key_attributes(self, *args: Any, **kwargs: Any) -> Any:
        host, pool = super().build_connection_pool_key_attributes(*args, **kwargs)
        pool.pop("ca_certs", None)
        return host, pool
