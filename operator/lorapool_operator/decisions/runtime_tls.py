"""What TLS adds to the objects of a base: a Secret with the certificates of its namespace, and its pods' use of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from lorapool_api.basemodel import KIND
from lorapool_api.common import API_VERSION, FIELD_MANAGER, LABEL_COMPONENT, LABEL_MANAGED_BY, LABEL_NAME
from lorapool_api.pod_address import CERTIFICATE, ENCRYPTED, KEY, PLAIN
from lorapool_operator.world.cluster_cache import BaseObject

TLS_DIR = "/etc/lorapool/tls"
TLS_SECRET = "lorapool-runtime-tls"
"""Name of the Secret, in each namespace with bases, that has the certificates of their runtimes."""


def serve_tls(pod: dict[str, Any], base: BaseObject) -> None:
    """Changes the spec of a pod so that its runtime serves HTTPS, with its own base's entries of the Secret."""
    runtime = next(item for item in pod["containers"] if item["name"] == "runtime")
    for port in runtime["ports"]:
        port["name"] = ENCRYPTED if port["name"] == PLAIN else port["name"]
    runtime["env"].append({"name": "LORAPOOL_RUNTIME_TLS_DIR", "value": TLS_DIR})
    runtime["volumeMounts"].append({"name": "runtime-tls", "mountPath": TLS_DIR, "readOnly": True})
    paths = zip(tls_entries(base.meta.uid), (CERTIFICATE, KEY), strict=True)
    items = [{"key": entry, "path": path} for entry, path in paths]
    secret = {"secretName": TLS_SECRET, "defaultMode": 0o440, "items": items}
    pod["volumes"].append({"name": "runtime-tls", "secret": secret})


def tls_entries(base_uid: str) -> tuple[str, str]:
    """Returns the keys, in the Secret of its namespace, of a base's certificate and of the private key."""
    return f"{base_uid}.crt", f"{base_uid}.key"


def certificates_secret(namespace: str, bases: Sequence[BaseObject], entries: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns the Secret with the certificates of a namespace. Kubernetes deletes it together with the last base."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": TLS_SECRET,
            "namespace": namespace,
            "labels": {LABEL_NAME: "lorapool-runtime", LABEL_COMPONENT: "runtime", LABEL_MANAGED_BY: FIELD_MANAGER},
            "ownerReferences": [owner_reference(base) for base in bases],
        },
        "data": {name: base64.b64encode(value).decode() for name, value in sorted(entries.items())},
    }


def owner_reference(base: BaseObject) -> dict[str, Any]:
    """Returns the reference by which Kubernetes deletes an object once its base is deleted."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": base.meta.name,
        "uid": base.meta.uid,
        "blockOwnerDeletion": False,
    }
