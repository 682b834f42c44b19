"""Which network addresses a source may lead to.

Called by every source that opens a connection to a host named by a tenant or by a redirect. Hosts are
taken as the URI says them, so an in-cluster registry works; refused are link-local and other addresses
where clouds put their metadata, and redirects from a public host into the private network. The address
that is checked is the one that was connected to, so a name that resolves differently a second time gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = frozenset(
    ipaddress.ip_address(text) for text in ("169.254.169.254", "100.100.100.200", "192.0.0.192", "fd00:ec2::254")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def parse_address(text: str) -> IpAddress:
    """The address, unwrapped where IPv6 carries an IPv4 one."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return inner or address
    return address


def is_forbidden(address: IpAddress) -> bool:
    """Never connected to, whoever asks."""
    return address in _METADATA or address.is_link_local or address.is_multicast or address.is_unspecified


def is_private(address: IpAddress) -> bool:
    return not address.is_global


class PeerGuard:
    """Judges each connection of one source. The first host is the one that the URI names."""

    def __init__(self, host: str, *, where: str) -> None:
        self._host = host.lower().strip("[]")
        self._where = where
        self._starts_private: bool | None = None

    def check_literal(self, host: str) -> None:
        """Refuses a host that is written as a forbidden address, before anything is sent towards it."""
        try:
            address = parse_address(host.strip("[]"))
        except ValueError:
            return
        if is_forbidden(address):
            raise _refused(self._where, f"{host} is an address no source may have")

    def check(self, host: str, peer: str) -> None:
        """Raises ArtifactError when `peer`, reached as `host`, must not be spoken to."""
        address = parse_address(peer)
        if is_forbidden(address):
            raise _refused(self._where, f"{host} is at {address}, an address no source may have")
        if host.lower().strip("[]") == self._host:
            self._starts_private = is_private(address)
        elif is_private(address) and not self._starts_private:
            raise _refused(self._where, f"it sends its readers on to {host} inside the private network")


def check_host(host: str, *, where: str) -> None:
    """For clients whose connections cannot be watched: every address of `host` must be allowed."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE, f"{where}: the host {host} is not found; it is tried again."
        ) from error
    for entry in found:
        address = parse_address(str(entry[4][0]))
        if is_forbidden(address):
            raise _refused(where, f"{host} is at {address}, an address no source may have")


def _refused(where: str, what: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.INVALID_SOURCE, f"{where} is refused: {what}. Use a host that serves the files itself."
    )
