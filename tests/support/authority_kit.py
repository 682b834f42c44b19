"""A release's authority and certificates of runtimes in folders, as Kubernetes mounts them."""

from __future__ import annotations

import itertools
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lorapool_api.pod_address import AUTHORITY, CERTIFICATE, KEY
from lorapool_api.trust.tls import ReleaseTrust, ServerCertificate
from lorapool_operator.effects.authority import Issuer, read_issuer

BASE_UID = "base-demo-tiny"


def authority(folder: Path, *, signed_by: Issuer | None = None, days: float = 3650, ca: bool = True) -> Issuer:
    """Writes tls.crt, tls.key and ca.crt of a new authority, of its own or signed by another."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(signed_by.certificate.subject if signed_by else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(signed_by.key if signed_by else key, hashes.SHA256())
    )
    root = signed_by.certificate if signed_by else made
    (folder / CERTIFICATE).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / KEY).write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / AUTHORITY).write_bytes(root.public_bytes(serialization.Encoding.PEM))
    return read_issuer(folder / CERTIFICATE, folder / KEY)


def serve_with(folder: Path, issuer: Issuer, base_uid: str = BASE_UID, *, age_days: float = 0) -> Path:
    """Writes tls.crt and tls.key of a base's runtimes, issued so long ago, by atomic replacement as a kubelet does."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = issuer.issue(base_uid, datetime.now(UTC) - timedelta(days=age_days))
    for name, content in zip((CERTIFICATE, KEY), pair, strict=True):
        (folder / f".{name}").write_bytes(content)
    for name in (CERTIFICATE, KEY):
        shutil.move(folder / f".{name}", folder / name)
    return folder


class Tls:
    """An authority in `<root>/ours`, runtimes' certificates in `<root>/served`, and what clients trust."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.issuer = authority(root / "ours")
        self.ca_file = root / "ours" / AUTHORITY

    def server(self, base_uid: str = BASE_UID, *, age_days: float = 0) -> ServerCertificate:
        return ServerCertificate(serve_with(self.root / "served", self.issuer, base_uid, age_days=age_days))

    def trust(self) -> ReleaseTrust:
        """Looks for a changed file at each connection."""
        return ReleaseTrust(self.ca_file, clock=itertools.count(0.0, 10.0).__next__)
