"""TLS and a bearer token for the listener that serves metrics and probes; both are optional and read again on change.

Probes need no token: the kubelet has none.
"""

from __future__ import annotations

import hmac
import ssl
from pathlib import Path

from lorapool_api.settings import ProcessSettings, SettingsError

CERTIFICATE, KEY = "tls.crt", "tls.key"


class MetricsAccess:
    """What a metrics listener needs of its process' settings."""

    def __init__(self, settings: ProcessSettings) -> None:
        """Raises SettingsError if a file that the settings name cannot be used."""
        self._folder = settings.metrics_tls_dir
        self._token_file = settings.metrics_token_file
        self._stamp = 0
        self.tls: ssl.SSLContext | None = None
        """For the listener; None: plain HTTP."""
        if self._folder is not None:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._load(self.tls, self._folder)
        if self._token_file is not None:
            self._token(self._token_file)

    def permits(self, authorization: str | None) -> bool:
        """Whether a request for the metrics with this Authorization header is answered.

        Also loads a renewed certificate, which the next connection gets.
        """
        if self.tls is not None and self._folder is not None:
            self._load(self.tls, self._folder)
        if self._token_file is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        try:
            wanted = self._token(self._token_file).encode()
        except SettingsError:
            return False
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(errors="replace"), wanted)

    def _load(self, context: ssl.SSLContext, folder: Path) -> None:
        try:
            stamp = (folder / CERTIFICATE).stat().st_mtime_ns
            if stamp != self._stamp:
                context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
                self._stamp = stamp
        except OSError as error:  # ssl.SSLError is one
            if not self._stamp:
                raise SettingsError(f"the certificate in {folder} cannot be used: {error.strerror or error}") from None

    @staticmethod
    def _token(file: Path) -> str:
        try:
            token = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise SettingsError(f"the metrics token file {file} cannot be read: {reason}") from None
        if not token:
            raise SettingsError(f"the metrics token file {file} is empty")
        return token
