"""The objects that the demo applies: namespace, API key, base and fine-tunes. Pure."""

from __future__ import annotations

import hashlib
from typing import Any

NAMESPACE = "lorapool"
RELEASE = "lorapool"
BASE = "smollm2"
KEYS_NAMESPACE = "lorapool-keys"
"""The chart's default for a release in that namespace."""
KEY_SECRET = "demo-key"

Manifest = dict[str, Any]


def namespace(name: str = NAMESPACE) -> Manifest:
    """A namespace that admits only pods of the restricted pod security standard."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def api_key(
    key: str, *, name: str = KEY_SECRET, keys_namespace: str = KEYS_NAMESPACE, namespaces: str = "*"
) -> Manifest:
    """The Secret of an API key: it holds only the key's hash."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "namespace": keys_namespace,
            "labels": {"lorapool.dev/api-key": "true"},
        },
        "stringData": {
            "keySha256": hashlib.sha256(key.encode()).hexdigest(),
            "namespaces": namespaces,
            "fineTuning": "true",
            "admin": "true",  # reads usage and costs of all projects
        },
    }


def base_model(uri: str, *, idle_after: str = "10m", namespace: str = NAMESPACE) -> Manifest:
    """SmolLM2-135M, at zero pods until the first request."""
    return {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "BaseModel",
        "metadata": {"name": BASE, "namespace": namespace},
        "spec": {
            "source": {"uri": uri},
            "servedName": "smollm2-135m-instruct",
            "dtype": "float32",
            "maxModelLen": 2048,
            "lora": {"maxRank": 16, "slots": 8, "hostCacheBytes": "256Mi"},
            "scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": idle_after},
            "coldStart": {"maxWait": "5m", "maxQueued": 256},
            "fineTuning": {"enabled": True, "tokensPerCycle": 1024, "idleAfter": "30s"},
        },
    }


def adapter(task: str, uri: str, *, idle_after: str = "2m", namespace: str = NAMESPACE) -> Manifest:
    """One fine-tune on that base."""
    return {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "LoraAdapter",
        "metadata": {"name": task, "namespace": namespace},
        "spec": {"baseModelRef": {"name": BASE}, "source": {"uri": uri}, "idleAfter": idle_after},
    }
