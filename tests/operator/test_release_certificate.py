"""The certificate of store or ledger: issued once, kept while valid, renewed in time, and one that clients accept."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from authority_kit import authority
from cryptography import x509

from lorapool_api.store_protocol import STORE_SERVER_NAME
from lorapool_api.usage_protocol import LEDGER_SERVER_NAME
from lorapool_operator.effects.authority import Authority
from lorapool_operator.effects.cluster import ObjectNotFoundError
from lorapool_operator.effects.release_certificate import ReleaseCertificate


class Secrets:
    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        self.writes = 0

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        if kind != "Secret" or (namespace, name) not in self.found:
            raise ObjectNotFoundError("404", 404)
        return self.found[namespace, name]

    async def apply_child(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.writes += 1
        self.found[manifest["metadata"]["namespace"], manifest["metadata"]["name"]] = manifest
        return manifest


@pytest.mark.parametrize(("component", "name"), [("store", STORE_SERVER_NAME), ("ledger", LEDGER_SERVER_NAME)])
async def test_the_certificate_is_issued_once_and_renewed_before_it_ends(
    component: str, name: str, tmp_path: Path
) -> None:
    authority(tmp_path / "ca")
    secrets, now = Secrets(), [datetime.now(UTC).timestamp()]
    keeper = ReleaseCertificate(
        secrets,  # type: ignore[arg-type]  # a fake
        Authority(tmp_path / "ca"),
        "lorapool",
        "the-tls",
        component,
        now_unix_s=lambda: now[0],
    )
    for _ in range(2):
        await keeper.ensure()
    assert secrets.writes == 1
    made = secrets.found["lorapool", "the-tls"]["data"]["tls.crt"]
    [certificate] = x509.load_pem_x509_certificates(base64.b64decode(made))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [name]
    now[0] += timedelta(days=61).total_seconds()
    await keeper.ensure()
    assert secrets.writes == 2
    secrets.found["lorapool", "the-tls"]["data"]["tls.key"] = ""
    await keeper.ensure()
    assert secrets.writes == 3
