"""How the API server is reached, by the operator's own client and by kopf: with a service account or a kubeconfig.

kopf's own search for credentials through every installed client library is not used. A service account's token is read
again after a few minutes, since the kubelet rotates it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import kopf
from aiohttp import ClientMiddlewareType
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config import load_kube_config
from kubernetes.aio.config.incluster_config import load_incluster_config

TOKEN_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
TOKEN_LIFE = timedelta(minutes=5)
CONNECTIONS = 64


class AccessError(Exception):
    """Neither a service account nor a kubeconfig is configured."""


def in_cluster(kubeconfig: Path | None) -> bool:
    """True if the pod's service account is used."""
    return kubeconfig is None and TOKEN_FILE.exists()


async def load_configuration(kubeconfig: Path | None) -> Configuration:
    """Uses the given kubeconfig, else the service account, else KUBECONFIG. Raises AccessError."""
    configuration = Configuration()
    if in_cluster(kubeconfig):
        load_incluster_config(client_configuration=configuration)
    else:
        path = kubeconfig or os.environ.get("KUBECONFIG")
        if not path:
            raise AccessError(
                "no service account, KUBECONFIG or --kubeconfig found: run in a cluster or name a kubeconfig"
            )
        await load_kube_config(config_file=str(path), client_configuration=configuration, persist_config=False)
    configuration.connection_pool_maxsize = CONNECTIONS
    configuration.client_session_kwargs = {"trust_env": False}  # proxies of the environment are for sources alone
    return configuration


def make_client(configuration: Configuration) -> ApiClient:
    """Returns the client of the operator's own calls. The caller closes it."""
    return ApiClient(configuration=configuration)


def login_handler(
    kubeconfig: Path | None, *middlewares: ClientMiddlewareType
) -> Callable[..., Awaitable[kopf.AiohttpSession]]:
    """Returns kopf's login handler, which uses the same configuration. All requests pass the middlewares."""

    async def login(**_: Any) -> kopf.AiohttpSession:
        configuration = await load_configuration(kubeconfig)
        header: object = await configuration.get_api_key_with_prefix("BearerToken")
        scheme, _space, token = (header if isinstance(header, str) else "").partition(" ")
        access = kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            username=configuration.username or None,
            password=configuration.password or None,
            scheme=scheme.capitalize() if token else None,
            token=token or None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )
        return kopf.AiohttpSession(
            server=access.server,
            aiohttp_session=aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=access.as_ssl_context()),
                headers=access.as_http_headers(),
                middlewares=middlewares,
            ),
            expiration=datetime.now(UTC) + TOKEN_LIFE if in_cluster(kubeconfig) else None,
        )

    return login
