"""Access to the release's store for others: where it is, whom to trust, and a token for no more than they need.

The operator has the store's master token, and gives it to no one.
"""

from __future__ import annotations

from pathlib import Path

from lorapool_api.store_protocol import StoreAccess, StoreGrant, mint
from lorapool_api.trust.runtime_tokens import MasterTokens


class StoreGrants:
    """Makes tokens of the store."""

    def __init__(self, url: str, masters: MasterTokens, ca_file: Path | None = None) -> None:
        """`ca_file` has the authorities (PEM) that sign the store's certificate; it is read for every use."""
        self._url = url
        self._masters = masters
        self._ca_file = ca_file

    def access(self, grant: StoreGrant) -> StoreAccess:
        """Returns access with exactly this grant; the same until token or authority change."""
        return StoreAccess(url=self._url, token=mint(self._masters.current()[0], grant), ca=self._ca())

    def of_namespace(self, namespace: str) -> StoreAccess:
        """Returns access by which the sources of a namespace are read."""
        return self.access(StoreGrant(read=(f"{namespace}/",)))

    def _ca(self) -> str:
        if self._ca_file is None or not self._url.startswith("https:"):
            return ""
        try:
            return self._ca_file.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return ""  # then nothing is trusted, and the store is tried again
