"""Where the runtime of a pod listens, whether it serves TLS there, and under which name.

The name of the pod's port is the scheme, so that pods with and without TLS serve together while one kind replaces the
other. A pod of a version that speaks no TLS is never asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

PLAIN, ENCRYPTED = "http", "https"
DOMAIN: Final = "runtimes.lorapool.internal"
CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"
"""The files of a mounted certificate, of its key, and of the authorities that are trusted."""


def runtime_port(spec: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the scheme and the port of the runtime in a pod of this spec; the port is 0 if there is none."""
    for container in spec.get("containers") or ():
        for port in container.get("ports") or ():
            if port.get("name") in (PLAIN, ENCRYPTED):
                return str(port["name"]), int(port["containerPort"])
    return PLAIN, 0


def url_of(scheme: str, ip: str, port: int) -> str:
    """Returns the URL without a path."""
    return f"{scheme}://[{ip}]:{port}" if ":" in ip else f"{scheme}://{ip}:{port}"


def server_name(base_uid: str) -> str:
    """Returns the name in the certificates of a base's runtimes."""
    return f"{base_uid}.{DOMAIN}"
