"""The few calls that this process makes to the API server, with the credentials and TLS of `kubernetes.aio`'s client.

Answers stay plain JSON, because converting thousands of objects to generated classes first would be slow. A request
in flight never causes a call, except to scale its base up while none of its replicas serves. Calls about fine-tuning
jobs, which are objects, do.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import ApiClient, Configuration

from lorapool_api.basemodel import PLURAL as BASEMODELS
from lorapool_api.common import GROUP, VERSION
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.routing.source import ScaleResult, scaled_up

REQUEST_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 5.0


TLS_GOODBYE_S = 0.5
"""TLS connections close a moment after their session; the loop must not end before."""


class KubeError(Exception):
    """The API server refused a call. Status 410 means: list again."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Kube:
    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    async def connect(cls, kubeconfig: Path | None) -> Kube:
        """With the pod's service account, or the given kubeconfig."""
        configuration = Configuration()
        if kubeconfig is not None:
            await kubernetes_config.load_kube_config(config_file=str(kubeconfig), client_configuration=configuration)
        else:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        configuration.retries = None  # watch and wake have their own back-off
        return cls(ApiClient(configuration))

    async def close(self) -> None:
        await self._client.close()
        await asyncio.sleep(TLS_GOODBYE_S)

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        async with self._call("GET", path, params=params) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            return answer

    async def watch(
        self, path: str, params: Mapping[str, str], inactivity_timeout_s: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Events until the server ends the watch. Raises TimeoutError when it is silent for too long."""
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=inactivity_timeout_s)
        async with self._call("GET", path, params={**params, "watch": "true"}, limits=limits) as response:
            async for line in response.content:
                yield json.loads(line)

    async def create_event(self, event: Mapping[str, Any]) -> None:
        """Creates an Event unless one of this name exists."""
        path = f"/api/v1/namespaces/{event['metadata']['namespace']}/events"
        try:
            async with self._call("POST", path, body=event) as response:
                await response.read()
        except KubeError as error:
            if error.status != HTTPStatus.CONFLICT:
                raise

    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Creates an object of the collection at this path, and returns it. Raises KubeError."""
        async with self._call("POST", path, body=body) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            return answer

    async def merge(self, path: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        """Changes the object at this path by a merge patch, and returns it. Raises KubeError."""
        async with self._call("PATCH", path, body=patch) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            return answer

    async def delete(self, path: str, uid: str) -> None:
        """Deletes the object at this path if it still has this uid. Raises KubeError."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}}
        async with self._call("DELETE", path, body=body) as response:
            await response.read()

    async def scale_up(self, ref: ObjectRef, add: int, bound: int) -> ScaleResult:
        """Writes over the resource version that was just read, so a number written in the meantime is never lowered."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{ref.namespace}/{BASEMODELS}/{ref.name}/scale"
        scale = await self.get(path)
        replicas = int((scale.get("spec") or {}).get("replicas") or 0)
        wanted = scaled_up(replicas, add, bound)
        if wanted == replicas:
            return ScaleResult.ALREADY_UP
        version = scale["metadata"]["resourceVersion"]
        patch = {"metadata": {"resourceVersion": version}, "spec": {"replicas": wanted}}
        try:
            async with self._call("PATCH", path, body=patch) as response:
                await response.read()
        except KubeError as error:
            if error.status == 409:
                return ScaleResult.CONFLICT
            raise
        return ScaleResult.WOKEN

    @asynccontextmanager
    async def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        limits: aiohttp.ClientTimeout | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers: dict[str, str] = {"Accept": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        answer = await self._client.rest_client.request(
            method,
            f"{self._client.configuration.host}{path}?{urlencode(params or {})}",
            headers=headers,
            body=body,
            _request_timeout=limits or aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
        )
        response: aiohttp.ClientResponse = answer.response
        try:
            if response.status >= 400:
                text = await response.text(errors="replace")
                raise KubeError(response.status, _message(text))
            yield response
        finally:
            response.release() if response.content.at_eof() else _cut(response)


def _cut(response: aiohttp.ClientResponse) -> None:
    """Ends a watch at once. An orderly TLS shutdown would wait for the server, even after the event loop has ended."""
    if response.connection is not None and response.connection.transport is not None:
        response.connection.transport.abort()
    response.close()


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return text[:300]
