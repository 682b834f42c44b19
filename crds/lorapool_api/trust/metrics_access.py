"""TLS and a bearer token for the listener that serves metrics and probes; both are optional and read again on change.

Probes need no token: the kubelet has none.
"""

from __future__ import annotations

import hmac
import ssl
from pathlib import Path

from lorapool_api.settings import ProcessSettings, SettingsError
from lorapool_api.trust.mounted_files import why_unreadable
from lorapool_api.trust.tls import ServerCertificate


class MetricsAccess:
    """What a metrics listener needs of its process' settings."""

    def __init__(self, settings: ProcessSettings) -> None:
        """Raises SettingsError if a file that the settings name cannot be used."""
        folder = settings.metrics_tls_dir
        self._token_file = settings.metrics_token_file
        self.tls: ssl.SSLContext | None = None if folder is None else ServerCertificate(folder).context
        """For the listener; None: plain HTTP."""
        if self._token_file is not None:
            self._token(self._token_file)

    def permits(self, authorization: str | None) -> bool:
        """Whether a request for the metrics with this Authorization header is answered."""
        if self._token_file is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        try:
            wanted = self._token(self._token_file).encode()
        except SettingsError:
            return False
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(errors="replace"), wanted)

    @staticmethod
    def _token(file: Path) -> str:
        try:
            token = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"the metrics token file {file} cannot be read: {why_unreadable(error)}") from None
        if not token:
            raise SettingsError(f"the metrics token file {file} is empty")
        return token
