"""TLS between the parts: certificates that are read again when their files change, and what a client checks.

A runtime serves with a certificate of its base, which the operator issues. Gateway and operator trust the release's own
authority alone, and check that the certificate is one of the base that they mean to reach.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lorapool_api.pod_address import CERTIFICATE, KEY
from lorapool_api.settings import SettingsError
from lorapool_api.trust.mounted_files import stamp_of, why_unreadable

log = logging.getLogger(__name__)

RECHECK_S: Final = 1.0
"""A change of the trusted authorities is noticed after at most this long."""
HANDSHAKE_TIMEOUT_S: Final = 5.0
"""The kernel accepts a connection for a busy process at once; its part of the handshake may take longer."""


class ServerCertificate:
    """The certificate of a listener. A renewed one is read when the next connection arrives, which already gets it."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingsError if the folder has no tls.crt and tls.key that can be used."""
        self._files = (folder / CERTIFICATE, folder / KEY)
        self._stamp = stamp_of(*self._files)
        try:
            self.context = self._current = self._read()
        except OSError as error:  # ssl.SSLError is one
            raise SettingsError(f"the certificate in {folder} cannot be used: {why_unreadable(error)}") from None
        self.context.sni_callback = self._handshake_begins

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # no client of ours resumes a session
        context.load_cert_chain(*self._files, password="")  # an encrypted key is an error, not a prompt
        return context

    def _handshake_begins(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        if (stamp := stamp_of(*self._files)) != self._stamp:
            self._stamp = stamp
            self._renew()
        if self._current is not self.context:
            connection.context = self._current

    def _renew(self) -> None:
        try:
            self._current = self._read()
            log.info("read the renewed certificate")
        except OSError as error:
            log.error(
                "cannot use the renewed certificate; the old one stays in force", extra={"error": why_unreadable(error)}
            )


class ReleaseTrust:
    """The authorities that gateway and operator trust when they connect to runtimes."""

    def __init__(self, file: Path | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`file` has their certificates and may be missing; without one, no runtime that serves TLS is trusted."""
        self._file = file
        self._clock = clock
        self._checked_s = clock()
        self._stamp = stamp_of(file) if file is not None else None
        self._context = _client_context()
        self._problem = f"the file {file} is missing" if self._stamp is None else ""
        if self._stamp is not None:
            self._read()

    def context(self) -> ssl.SSLContext:
        """Returns what the next connection is made with: the same object until the trusted authorities change."""
        if self._file is not None and self._clock() - self._checked_s >= RECHECK_S:
            self._checked_s = self._clock()
            if (stamp := stamp_of(self._file)) != self._stamp:
                self._stamp = stamp
                self._read()
        return self._context

    def _read(self) -> None:
        """Keeps the authorities that were read before when the changed file cannot be used."""
        assert self._file is not None
        try:
            context = _client_context()
            context.load_verify_locations(self._file)
        except OSError as error:
            self._problem = f"the file {self._file} cannot be used: {why_unreadable(error)}"
            log.error("cannot read the trusted authorities; the old ones stay in force", extra={"error": self._problem})
            return
        self._context, self._problem = context, ""
        log.info("read the trusted authorities")

    def refusal(self, error: BaseException) -> str:
        """Returns which check of a runtime's certificate failed and the remedy; "" for any other error."""
        found = _tls_error(error)
        if found is None or isinstance(found, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):  # the connection was lost
            return ""
        if not isinstance(found, ssl.SSLCertVerificationError):
            return f"The TLS handshake failed ({found.reason}). If this lasts, restart the pod."
        check, remedy = _CHECKS.get(found.verify_code, (f"it is not valid ({found.verify_message})", _LOOK_UP))
        note = f" ({self._problem})" if self._problem else ""
        return f"The runtime's certificate is refused: {check}{note}. {remedy}"


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks authority and name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """Returns the error of OpenSSL itself behind that of an HTTP client, which may be of the same type."""
    found = None
    while error is not None:
        found = error if isinstance(error, ssl.SSLError) else found
        error = error.__cause__
    return found


_LOOK_UP = "The operator issues certificates: see its log and the conditions of the base."
_OTHER_AUTHORITY = (
    "it is not signed by an authority of this release",
    "After a change of the authority this lasts two minutes at most. If it lasts longer, restart the pod.",
)
_CHECKS = {
    9: ("it is not valid yet", "Set the clocks of the nodes."),
    10: ("it has expired", _LOOK_UP),
    18: _OTHER_AUTHORITY,
    19: _OTHER_AUTHORITY,
    20: _OTHER_AUTHORITY,
    21: _OTHER_AUTHORITY,
    62: ("it is not one of this base", "Its address may belong to another pod by now. If this lasts, restart the pod."),
}
"""By OpenSSL's code of the failed check: what is wrong, and the remedy."""
