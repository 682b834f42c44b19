"""The release's authority: it issues the certificates with which the runtimes of each base serve.

Its key is in a Secret of the release's namespace that only the operator mounts.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lorapool_api.pod_address import CERTIFICATE, KEY, server_name
from lorapool_api.settings import SettingsError
from lorapool_api.trust.mounted_files import stamp_of, why_unreadable

log = logging.getLogger(__name__)

VALIDITY = timedelta(days=90)
RENEWED_SHARE = 1 / 3
"""A certificate is renewed when this share of its time is left: after 60 of 90 days."""
SKEW = timedelta(hours=1)
"""Certificates are valid from so long before they are issued, for nodes whose clock is late."""
EXPIRY_NOTICE = timedelta(days=30)


AuthorityKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class Pair(NamedTuple):
    """A certificate with those of the authorities between it and the trusted one, and its key, in PEM."""

    certificate: bytes
    key: bytes


class Issuer(NamedTuple):
    """The authority as its files have it."""

    certificate: x509.Certificate
    key: AuthorityKey
    between: bytes
    """The certificates (PEM) that lead from this authority to the trusted one; empty if it is that itself."""

    def issue(self, base_uid: str, now: datetime) -> Pair:
        """Issues a certificate with a new key, not valid for longer than the authority itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lorapool runtime")]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - SKEW, self.certificate.not_valid_before_utc))
            .not_valid_after(min(now + VALIDITY, self.certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(server_name(base_uid))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_key_identifier(self.certificate), critical=False)
        )
        algorithm = None if isinstance(self.key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        made = builder.sign(self.key, algorithm).public_bytes(serialization.Encoding.PEM)
        return Pair(made + self.between, _pem(key))

    def renewal_s(self, pair: Pair, base_uid: str) -> float:
        """Returns when the pair is to be replaced, in Unix time; 0 if it is not this authority's for this base."""
        try:
            certificate, *_ = x509.load_pem_x509_certificates(pair.certificate)
            key = serialization.load_pem_private_key(pair.key, password=None)
            certificate.verify_directly_issued_by(self.certificate)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return 0.0
        is_ours = (
            names.get_values_for_type(x509.DNSName) == [server_name(base_uid)]
            and key.public_key() == certificate.public_key()
            and pair.certificate.endswith(self.between)
        )
        from_s, to_s = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
        return to_s - (to_s - from_s) * RENEWED_SHARE if is_ours else 0.0


class Authority:
    """The files of the authority, which are read again when they change."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingsError if tls.crt and tls.key in the folder are not those of an authority."""
        self._files = (folder / CERTIFICATE, folder / KEY)
        self._stamp = stamp_of(*self._files)
        self._issuer = read_issuer(*self._files)

    def issuer(self) -> Issuer:
        """Returns the authority; the last one that could be read while the changed files cannot be used."""
        if (stamp := stamp_of(*self._files)) != self._stamp:
            self._stamp = stamp
            try:
                self._issuer = read_issuer(*self._files)
                log.info("read the changed authority; certificates of runtimes are issued again")
            except SettingsError as error:
                log.error("cannot use the changed authority; the old one stays in force", extra={"error": str(error)})
        return self._issuer

    def expiry_unix_s(self) -> float:
        """Returns when the authority in use expires, in Unix time."""
        return self._issuer.certificate.not_valid_after_utc.timestamp()


def read_issuer(certificate: Path, key: Path) -> Issuer:
    """Reads an authority. Raises SettingsError, which shows no part of the key."""
    where = f"the authority in {certificate.parent}"
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise SettingsError(f"{where} cannot be read: {why_unreadable(error)}") from None
    except (ValueError, TypeError):
        raise SettingsError(f"{where} is no certificate and key in PEM, or its key is encrypted") from None
    if not isinstance(private, AuthorityKey):
        raise SettingsError(f"{where} cannot issue certificates: its key must be one of EC, RSA or Ed25519")
    if problem := _problem(chain[0], private):
        raise SettingsError(f"{where} cannot issue certificates: {problem}")
    _warn_before_expiry(chain[0])
    between = [item for item in chain if item.issuer != item.subject]
    return Issuer(chain[0], private, b"".join(item.public_bytes(serialization.Encoding.PEM) for item in between))


def _problem(certificate: x509.Certificate, key: AuthorityKey) -> str:
    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if not is_authority:
        return "the certificate in tls.crt is not one of an authority (basicConstraints CA:TRUE)"
    if key.public_key() != certificate.public_key():
        return "tls.key is not the key of tls.crt"
    return ""


def _warn_before_expiry(certificate: x509.Certificate) -> None:
    if certificate.not_valid_after_utc - datetime.now(UTC) < EXPIRY_NOTICE:
        log.warning(
            "the authority of the runtimes' certificates expires on %s; replace it before",
            certificate.not_valid_after_utc,
        )


def _key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        found = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
